"""The peers' own environment, made on first use, and how they are asked: a script in it, one JSON line back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

from recray.errors import ClusterError
from recray.stages import Say
from recray.storage import key_of

PINS = {"rectools": ("torch==2.13.0", "rectools[torch]==0.19.0", "implicit==0.7.3", "pyarrow==25.0.1")}
HOME = {"rectools": "rectools", "implicit": "rectools"}  # whose environment a peer runs in


def ask(peer: str, question: dict[str, Any], folder: Path, say: Say) -> dict[str, Any]:
    """Run `<peer>_peer.py` in the peer's environment with a question; its answer.

    Raises ClusterError if the environment cannot be made or the peer fails.
    """
    python = environment(HOME[peer], say)
    asked = folder / "question.json"
    asked.write_text(json.dumps(question))
    script = str(resources.files("recray.benchmark") / f"{peer}_peer.py")
    said = folder / "answer.json"  # a pipe that nobody reads yet would hold up a long answer
    command = [str(python), script, str(asked)]
    with open(said, "w") as out, subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, text=True, cwd=folder) as process:
        assert process.stderr
        last: list[str] = []
        for line in process.stderr:
            last = [*last[-9:], line.strip()]
            if line.startswith("{"):
                say(f"{peer}: {line.strip()}")
    if process.returncode:
        raise ClusterError(f"{peer} failed: {' | '.join(last)[-600:]}", f"run it by hand: {python} {script}")
    answer: dict[str, Any] = json.loads(said.read_text().strip().splitlines()[-1])
    return answer


def cache() -> Path:
    """Where environments and long runs of peers are kept, under the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "recray" / "peers"


def environment(peer: str, say: Say) -> Path:
    """The Python of the peer's environment, under the user's cache; $RECRAY_TORCH_INDEX names an index with a CPU build of torch."""
    home = cache() / f"{peer}-{key_of(PINS[peer])}"
    python, complete = home / "bin" / "python", home / ".complete"
    if complete.exists():
        return python
    say(f"making the environment of {peer} (some minutes, once)")
    index = ["--index-url", os.environ["RECRAY_TORCH_INDEX"]] if os.environ.get("RECRAY_TORCH_INDEX") else []
    torch, *rest = PINS[peer]
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    for command in ([sys.executable, "-m", "venv", str(home)], [*pip, *index, torch], [*pip, *rest]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ClusterError(f"the environment of {peer} could not be made: {done.stderr.strip()[-600:]}", "check the network and pip's index")
    complete.touch()
    return python
