"""What MkDocs cannot do by itself: the pages that are generated, the README as the first page, and links to
files outside of the pages.
"""

from __future__ import annotations

import argparse
import ast
import html
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from recray import errors
from recray.cli import build_parser
from recray.config import Settings
from recray.serving.http import openapi
from recray.serving.telemetry import METRICS

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "infra" / "benchmarks"
BASELINES = "<!-- baselines: a table for each result file -->"
LINK = re.compile(r"\]\((\.\.?/[^)#\s]+|[\w.][^)#:\s]*)(#[^)\s]+)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for name, content in {
        "index": readme(),
        "configuration": configuration(),
        "commands": commands(),
        "rest": rest(),
        "metrics": metrics(),
        "troubleshooting": troubleshooting(),
    }.items():
        files.append(File.generated(config, f"{name}.md", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put files of the repository that a page links to into the site."""

    def inside(match: re.Match[str]) -> str:
        target = (Path(config.docs_dir) / page.file.src_uri).parent / match[1]
        path = target.resolve()
        if path.is_relative_to(config.docs_dir) or not path.is_file() or not path.is_relative_to(REPOSITORY):
            return match[0]
        uri = f"files/{path.relative_to(REPOSITORY).as_posix().replace('.md', '.txt').lstrip('.')}"
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, abs_src_path=str(path)))
        return f"]({uri}{match[2] or ''})"

    if page.file.src_uri == "benchmarks.md":
        markdown = markdown.replace(BASELINES, baselines())
    return LINK.sub(inside, markdown)


def baselines() -> str:
    """A table for each data set: its newest result of `recray benchmark quality --against baselines,…`."""
    newest: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in sorted(RESULTS.glob("quality-*.json")):
        metrics = json.loads(path.read_text()).get("metrics", {})
        if "rankers" in metrics:
            newest[path.name.rpartition("-")[0]] = path, metrics
    lines: list[str] = []
    for stem, (path, metrics) in newest.items():
        lines += [
            f"### {stem.removeprefix('quality-')}",
            f"{metrics['users']:,} test users, {metrics['items']:,} items "
            f"([result](../../benchmarks/{path.name})).",
            "",
            "| | seeds | NDCG@10 | recray's lead | NDCG@10, new items | recray's lead | training | memory "
            "| users/s |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for name, line in metrics["rankers"].items():
            cells = [name, str(line["seeds"])]
            for protocol in ("with_repeats", "filter_seen"):
                ndcg = line.get(protocol, {}).get("ndcg@10")
                lead = line.get("lead", {}).get(protocol) or []
                cells.append("" if ndcg is None else f"{ndcg:.4f}")
                cells.append(f"{lead[0]:+.4f} [{lead[1]:+.4f}, {lead[2]:+.4f}]" if lead else "")
            seconds = line.get("train_s")
            note = "" if line.get("stopped_early", 1) else ", cut off"
            cells.append("" if seconds is None else f"{seconds:.0f} s{note}")
            cells.append(f"{line['peak_memory_mb']:.0f} MB" if "peak_memory_mb" in line else "")
            cells.append(f"{line['users_per_s']:.0f}")
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def readme() -> str:
    """The README, as a page among the others."""
    text = (REPOSITORY / "README.md").read_text().replace("](infra/docs/pages/", "](")
    return re.sub(r"\]\(((?:jobs|recray|\.github|infra)/[^)]+)\)", r"](../../../\1)", text)


def configuration() -> str:
    """All settings by section."""
    lines = [
        "# Configuration",
        "",
        "A settings file is YAML with these sections. Override any setting on the command line, for example "
        "`train.epochs=3`.",
        "",
    ]
    for section, field in Settings.model_fields.items():
        model: Any = field.annotation
        lines += [f"## {section}", "", "| setting | default | meaning |", "|---|---|---|"]
        for name, setting in model.model_fields.items():
            default = json.dumps(
                setting.get_default(call_default_factory=True), default=str, ensure_ascii=False
            )
            lines.append(f"| `{section}.{name}` | `{cell(default)}` | {cell(setting.description or '')} |")
        lines.append("")
    return "\n".join(lines)


def commands() -> str:
    """The help of every command."""
    (group,) = (
        action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)
    )
    lines = [
        "# Commands",
        "",
        "Every job ends with one JSON line and an [exit code](operations.md#exit-codes).",
        "",
    ]
    for name, command in group.choices.items():
        command.prog = f"recray {name}"
        lines += [f"## recray {name}", "", "```text", command.format_help().rstrip(), "```", ""]
    return "\n".join(lines)


def rest() -> str:
    """The endpoint's OpenAPI document."""
    document = json.loads(openapi())
    schemas = document["components"]["schemas"]
    lines = [
        "# REST API",
        "",
        "The endpoint's own page `/docs` has the same content. Errors are problem documents (RFC 9457).",
        "",
    ]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            lines += [
                f"## {method.upper()} {path}",
                "",
                f"**{operation['summary']}.** {operation.get('description', '')}",
                "",
            ]
            for title, schema in (
                ("Request", _schema(operation.get("requestBody"))),
                ("Response", _schema(operation["responses"].get("200"))),
            ):
                if schema is not None:
                    lines += [f"{title}: {_link(schema)}", ""]
    lines += ["## Schemas", ""]
    for name, schema in schemas.items():
        lines += [f"### {name}", "", cell(schema.get("description", "")), ""]
        if "properties" in schema:
            lines += ["| field | type | meaning |", "|---|---|---|"]
            required = schema.get("required", [])
            for field, what in schema["properties"].items():
                kind = cell(_type(what)) + ("" if field in required else ", optional")
                lines.append(f"| `{field}` | {kind} | {cell(what.get('description', ''))} |")
            lines.append("")
        for example in schema.get("examples", []):
            lines += ["```json", json.dumps(example, indent=2, ensure_ascii=False), "```", ""]
    return "\n".join(lines)


def metrics() -> str:
    """The endpoint's Prometheus metrics."""
    lines = [
        "# Metrics",
        "",
        "The endpoint counts on Ray's metrics port, where Prometheus reads. Ray puts `ray_` before each name "
        "and adds labels of its own. The dashboard and the alerts in `infra/grafana` read these names. What "
        "a nightly run measures is in MLflow and in [its outputs](outputs.md#metrics-of-a-run).",
        "",
        "| metric | kind | labels | meaning |",
        "|---|---|---|---|",
    ]
    for name, metric in METRICS.items():
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        lines.append(f"| `{name}` | {metric.kind} | {labels} | {cell(metric.description)} |")
    return "\n".join(lines) + "\n"


def troubleshooting() -> str:
    """Every error that is raised on purpose, with its fix, as the code has them."""
    lines = [
        "# Troubleshooting",
        "",
        "Every error names its cause and the fix. This page lists all errors by kind. An … stands for a name "
        "or a number.",
        "",
    ]
    messages: dict[str, set[tuple[str, str]]] = {}
    for path in sorted((REPOSITORY / "recray").rglob("*.py")):
        if "benchmark" in path.parts or "testing" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            kind = getattr(errors, name, None)
            if isinstance(kind, type) and issubclass(kind, errors.RecrayError) and len(node.args) == 2:  # type: ignore[attr-defined]
                what, fix = (_text(argument) for argument in node.args)  # type: ignore[attr-defined]
                if what.strip("… ") and fix.strip("… "):
                    messages.setdefault(name, set()).add((what, fix))
    for name, pairs in sorted(messages.items()):
        code = getattr(errors, name).exit_code
        lines += [
            f"## {name}",
            "",
            f"{(getattr(errors, name).__doc__ or '').splitlines()[0]} Exit code {code}.",
            "",
            "| message | fix |",
            "|---|---|",
        ]
        lines += [f"| {cell(html.escape(what))} | {cell(html.escape(fix))} |" for what, fix in sorted(pairs)]
        lines.append("")
    return "\n".join(lines)


def _text(node: ast.expr) -> str:
    """Of a string in code; … for what is not known before it runs."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return "…"


def _schema(content: dict[str, Any] | None) -> dict[str, Any] | None:
    media = (content or {}).get("content", {}).get("application/json")
    return None if media is None else media.get("schema")


def _link(schema: dict[str, Any]) -> str:
    name = schema.get("$ref", "").rpartition("/")[2]
    return f"[{name}](#{name.lower()})" if name else _type(schema)


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return _link(schema)
    if "anyOf" in schema:
        return " or ".join(_type(one) for one in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return str(schema.get("type", "any"))


def cell(text: str) -> str:
    """Of a table: on one line, without what would end it."""
    return text.replace("|", "\\|").replace("\n", " ").strip()
