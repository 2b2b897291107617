"""Writes `operations.py` from the endpoint's OpenAPI document: `python -m recray.client.generate`.

Each component becomes a TypedDict, each operation a method of `Operations` and of `AsyncOperations`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recray.serving.http import openapi

TARGET = Path(__file__).with_name("operations.py")
SCALARS = {"integer": "int", "number": "float", "string": "str", "boolean": "bool", "null": "None"}
REPEATABLE = {"recommendations", "operation", "items"}
"""Tags of the operations that may be repeated: they write nothing, or the same once more."""
HEADER = '''"""The endpoint's operations and their types. Written by `python -m recray.client.generate`."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, Literal, Required, TypedDict
from urllib.parse import quote, urlencode


def add_query(path: str, values: dict[str, Any]) -> str:
    """The path with the values that are not None as its query."""
    sent = {name: value for name, value in values.items() if value is not None}
    return f"{path}?{urlencode(sent)}" if sent else path
'''


def generate() -> str:
    """The source of `operations.py`."""
    document = json.loads(openapi())
    blocks = [HEADER]
    blocks += [_to_typed_dict(name, schema) for name, schema in document["components"]["schemas"].items()]
    operations = [
        (path, method, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    for name, is_async in (("Operations", False), ("AsyncOperations", True)):
        call = (
            "    def _call(self, method: str, path: str, body: dict[str, Any] | None = None, *, "
            "repeatable: bool) -> Any:\n        raise NotImplementedError\n"
        )
        of = "that are awaited" if is_async else "that return when the response is there"
        head = f'class {name}:\n    """The operations of the endpoint, as methods {of}."""\n\n{call}'
        methods = [_to_method(*operation, document, is_async=is_async) for operation in operations]
        blocks.append("\n".join([head, *methods]))
    return _format("\n\n".join(blocks))


def _format(source: str) -> str:
    ruff = Path(sys.executable).with_name("ruff")  # of recray[dev]
    words = [str(ruff), "format", "--quiet", "--stdin-filename", str(TARGET), "-"]
    return subprocess.run(words, input=source, capture_output=True, text=True, check=True).stdout


def _to_typed_dict(name: str, schema: dict[str, Any]) -> str:
    required = set(schema.get("required", ()))
    lines = [f"class {name}(TypedDict, total=False):", *_to_docstring(schema.get("description", ""), 4)]
    for field, content in schema.get("properties", {}).items():
        annotation = _to_annotation(content)
        lines.append(f"    {field}: {f'Required[{annotation}]' if field in required else annotation}")
    return "\n".join(lines) + "\n"


def _to_method(
    path: str, method: str, operation: dict[str, Any], document: dict[str, Any], *, is_async: bool
) -> str:
    name = operation["operationId"].split("_v1_")[0].split(f"_{path.strip('/')}_")[0]
    parameters = operation.get("parameters", ())
    in_path = [parameter["name"] for parameter in parameters if parameter["in"] == "path"]
    in_query = {each["name"]: each["schema"] for each in parameters if each["in"] == "query"}
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    body = document["components"]["schemas"][_to_annotation(content)] if content else {}
    required = set(body.get("required", ()))
    properties = body.get("properties", {})
    fields = sorted((properties | in_query).items(), key=lambda field: field[0] not in required)

    result = _to_annotation(operation["responses"]["200"]["content"]["application/json"]["schema"])
    arguments = ["self", *(f"{parameter}: int | str" for parameter in in_path)]
    arguments += ["*"] if fields else []
    for field, schema in fields:
        annotation = _to_annotation(schema)
        if field in required:
            arguments.append(f"{field}: {annotation}")
        else:
            arguments.append(f"{field}: {annotation.removesuffix(' | None')} | None = None")

    returned = f"Awaitable[{result}]" if is_async else result
    lines = [f"    def {name}({', '.join(arguments)}) -> {returned}:"]
    texts = [f"{operation['summary']}. {operation.get('description', '')}".strip()]
    texts += [""] if any("description" in schema for _, schema in fields) else []
    texts += [f"{field} : {schema['description']}" for field, schema in fields if "description" in schema]
    lines += _to_docstring("\n".join(texts), 8)
    target = f'"{path}"'
    if in_path:
        quoted = re.sub(r"{(\w+)}", r"{quote(str(\1), safe='')}", path)
        target = f'f"{quoted}"'
    if in_query:
        pairs = ", ".join(f'"{field}": {field}' for field in in_query)
        target = f"add_query({target}, {{{pairs}}})"
    pairs = ", ".join(f'"{field}": {field}' for field, _ in fields if field in properties)
    sent = f", {{{pairs}}}" if properties else ""
    repeatable = bool(REPEATABLE & set(operation["tags"]))
    call = f'self._call("{method.upper()}", {target}{sent}, repeatable={repeatable})'
    lines += [f"        response: {returned} = {call}", "        return response"]
    return "\n".join(lines) + "\n"


def _to_annotation(schema: dict[str, Any]) -> str:
    """The Python type of a schema."""
    if "$ref" in schema:
        return str(schema["$ref"].rsplit("/", 1)[-1])
    if "anyOf" in schema:
        return " | ".join(dict.fromkeys(map(_to_annotation, schema["anyOf"])))
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return f"Literal[{', '.join(json.dumps(value) for value in values)}]"
    if schema.get("type") == "array":
        return f"list[{_to_annotation(schema.get('items', {}))}]"
    if schema.get("type") == "object":
        values_schema = schema.get("additionalProperties")
        return f"dict[str, {_to_annotation(values_schema) if isinstance(values_schema, dict) else 'Any'}]"
    return SCALARS.get(schema.get("type", ""), "Any")


def _to_docstring(text: str, indent: int) -> Iterator[str]:
    if not text:
        return
    space = " " * indent
    lines = [
        line
        for number, part in enumerate(text.split("\n"))
        for line in textwrap.wrap(
            part.replace("\\", "\\\\"),
            width=108 - indent - (3 if number == 0 else 0),
            subsequent_indent="" if number == 0 else "    ",
        )
        or [""]
    ]
    if len(lines) == 1:
        yield f'{space}"""{lines[0]}"""'
        return
    yield f'{space}"""{lines[0]}'
    yield from (f"{space}{line}" if line else "" for line in lines[1:])
    yield f'{space}"""'


if __name__ == "__main__":
    TARGET.write_text(generate())
