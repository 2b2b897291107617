"""Runs baseline libraries: each in an environment of its own, created on first use, by a script that returns
one JSON line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

from recray.errors import ClusterError
from recray.stages import ProgressLog
from recray.storage import key_of

PINS = {"rectools": ("torch==2.13.0", "rectools[torch]==0.19.0", "implicit==0.7.3", "pyarrow==25.0.1")}
HOME = {"rectools": "rectools", "implicit": "rectools"}  # the environment of each library


def run_library(library: str, request: dict[str, Any], folder: Path, say: ProgressLog) -> dict[str, Any]:
    """Run `<library>_peer.py` in the library's environment with a request; the JSON that it returns.

    Raises ClusterError if the environment cannot be created or the library fails.
    """
    python = create_environment(HOME[library], say)
    request_file = folder / "request.json"
    request_file.write_text(json.dumps(request))
    script = str(resources.files("recray.benchmark") / f"{library}_peer.py")
    # a file, since a pipe that is not read yet would block a long response
    response_file = folder / "response.json"
    command = [str(python), script, str(request_file)]
    with (
        open(response_file, "w") as out,
        subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, text=True, cwd=folder) as process,
    ):
        assert process.stderr
        last_lines: list[str] = []
        for line in process.stderr:
            last_lines = [*last_lines[-9:], line.strip()]
            if line.startswith("{"):
                say(f"{library}: {line.strip()}")
    if process.returncode:
        raise ClusterError(
            f"{library} failed: {' | '.join(last_lines)[-600:]}", f"run it manually: {python} {script}"
        )
    result: dict[str, Any] = json.loads(response_file.read_text().strip().splitlines()[-1])
    return result


def cache() -> Path:
    """Folder of the environments and long runs of baseline libraries, under the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "recray" / "peers"


def create_environment(library: str, say: ProgressLog) -> Path:
    """The Python of the library's environment, which is created in the user's cache if it does not exist.
    $RECRAY_TORCH_INDEX names an index with a CPU build of torch.
    """
    home = cache() / f"{library}-{key_of(PINS[library])}"
    python, complete = home / "bin" / "python", home / ".complete"
    if complete.exists():
        return python
    say(f"creating the environment of {library} (some minutes, once)")
    index = ["--index-url", os.environ["RECRAY_TORCH_INDEX"]] if os.environ.get("RECRAY_TORCH_INDEX") else []
    torch, *rest = PINS[library]
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    for command in ([sys.executable, "-m", "venv", str(home)], [*pip, *index, torch], [*pip, *rest]):
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode:
            raise ClusterError(
                f"the environment of {library} could not be created: {process.stderr.strip()[-600:]}",
                "check the network and pip's index",
            )
    complete.touch()
    return python
