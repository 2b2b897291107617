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
from typing import NotRequired, TypedDict

from recray.errors import ClusterError
from recray.stages import ProgressLog
from recray.storage import key_of

PINS = {"rectools": ("torch==2.13.0", "rectools[torch]==0.19.0", "implicit==0.7.3", "pyarrow==25.0.1")}
ENVIRONMENTS = dict.fromkeys(("rectools", "rectools_models", "implicit"), "rectools")  # of each library


class LibraryRequest(TypedDict):
    """The request to a library: the data, the shape of the network, and the work, see `rectools_peer.py`.

    events : Parquet file of `recray.benchmark.data.write_events`
    batches : training batches of an epoch; without it all of them
    model, seconds_at_most, has_time, filter_seen, lists : see `rectools_models_peer.py`
    """

    events: str
    threads: int
    dim: int
    blocks: int
    heads: int
    history: int
    dropout: float
    learning_rate: float
    seed: int
    batch_users: int
    epochs: NotRequired[int]
    batches: NotRequired[int]
    recommend: NotRequired[int]
    patience: NotRequired[int]
    validation_users: NotRequired[list[int]]
    keep: NotRequired[str]
    epochs_at_most: NotRequired[int]
    model: NotRequired[str]
    seconds_at_most: NotRequired[float]
    has_time: NotRequired[bool]
    filter_seen: NotRequired[bool]
    lists: NotRequired[str]


class LibraryLine(TypedDict):
    """A line of a learning curve: an epoch, the seconds and CPU seconds of the training so far, and the mean
    NDCG of the validation users.
    """

    epoch: int
    seconds: float
    cpu_seconds: float
    validation_ndcg: float


class LibraryResponse(TypedDict, total=False):
    """The response of a library, with the fields that its request asks for.

    epoch_s : seconds of each epoch
    users, recommend_s : number of users, and the seconds of each round of their recommendations
    ranks : rank of the test item of each user, by the user's number, from 1; 0: not ranked
    """

    epoch_s: list[float]
    users: int
    recommend_s: list[float]
    curve: list[LibraryLine]
    best_epoch: int
    ranks: dict[str, int]
    peak_memory_mb: float


def run_library(
    library: str, request: LibraryRequest, folder: Path, progress: ProgressLog
) -> LibraryResponse:
    """Run `<library>_peer.py` in the library's environment with a request; the JSON that it returns.

    Raises ClusterError if the environment cannot be created or the library fails.
    """
    python = create_environment(ENVIRONMENTS[library], progress)
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
                progress(f"{library}: {line.strip()}")
    if process.returncode:
        raise ClusterError(
            f"{library} failed: {' | '.join(last_lines)[-600:]}", f"run it manually: {python} {script}"
        )
    result: LibraryResponse = json.loads(response_file.read_text().strip().splitlines()[-1])
    return result


def cache() -> Path:
    """Folder of the environments and long runs of baseline libraries, under the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "recray" / "peers"


def create_environment(library: str, progress: ProgressLog) -> Path:
    """The Python of the library's environment, which is created in the user's cache if it does not exist.
    $RECRAY_TORCH_INDEX names an index with a CPU build of torch.
    """
    environment = cache() / f"{library}-{key_of(PINS[library])}"
    python, complete = environment / "bin" / "python", environment / ".complete"
    if complete.exists():
        return python
    progress(f"creating the environment of {library} (some minutes, once)")
    index = ["--index-url", os.environ["RECRAY_TORCH_INDEX"]] if os.environ.get("RECRAY_TORCH_INDEX") else []
    torch, *rest = PINS[library]
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    for command in ([sys.executable, "-m", "venv", str(environment)], [*pip, *index, torch], [*pip, *rest]):
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode:
            raise ClusterError(
                f"the environment of {library} could not be created: {process.stderr.strip()[-600:]}",
                "check the network and pip's index",
            )
    complete.touch()
    return python
