"""Places under `storage.root`, and the one way in which recray writes a directory that others read.

A sealed directory is immutable. It is written beside its final place, every file is fsynced, `manifest.json` (format
version, kind, sha256 of every file, and the writer's fields) comes last, and one rename makes it visible. A reader
therefore sees all of it or nothing, whatever was killed when. Files that change (`LATEST.json`) are replaced by rename.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recray.errors import ArtifactError, DamagedArtifactError, MissingArtifactError, OutputExistsError, RefusedError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


class Storage:
    """The folders under one `storage.root`."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def dataset(self, key: str) -> Path:
        return self.root / "datasets" / key

    def bundle(self, key: str) -> Path:
        return self.root / "bundles" / key

    def evaluation(self, key: str) -> Path:
        return self.root / "evaluations" / key

    def quarantine(self, key: str) -> Path:
        return self.root / "quarantine" / key

    def staging(self, key: str) -> Path:
        """Scratch space of one prepare run; removed when it ends."""
        return self.root / "staging" / key

    @property
    def scores(self) -> Path:
        return self.root / "scores"

    @property
    def training_runs(self) -> Path:
        """Checkpoints of Ray Train, a folder a run key."""
        return self.root / "training"

    @property
    def latest(self) -> Path:
        """The pointer to the snapshot that readers use."""
        return self.root / "LATEST.json"

    def tracked(self, key: str) -> Path:
        """Marks that MLflow was told of a job's output."""
        return self.root / "tracked" / f"{key}.json"

    @property
    def tracking(self) -> Path:
        return self.root / "mlflow"


@contextlib.contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold the lock file `path`. Without `wait` raises RefusedError if another process holds it; ArtifactError if it cannot be made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115 - entered below
    except OSError as error:
        raise ArtifactError(f"{path.parent} cannot be written to: {error}", "check storage.root and its permissions") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise RefusedError(f"another job is at work in {path.parent}", "wait until it ends, or use another storage.root") from None
        yield


def sha256_file(path: str | Path) -> str:
    """Hex sha256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def key_of(*parts: Any) -> str:
    """First 16 hex digits of the sha256 of the parts' canonical JSON."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_json(path: Path, content: Any) -> None:
    """Replace `path` by `content` in one step; a reader sees the old or the new file, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with open(scratch, "w") as file:
        json.dump(content, file, indent=2, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)
    _fsync_directory(path.parent)


def read_json(path: Path) -> Any:
    """Content of a JSON file. Raises MissingArtifactError or DamagedArtifactError."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise MissingArtifactError(f"{path} does not exist", "run the job that writes it first") from None
    except ValueError as error:
        raise DamagedArtifactError(f"{path} is not JSON: {error}", "remove it and repeat the job that wrote it") from None


@contextlib.contextmanager
def sealed_directory(path: Path, kind: str, run_key: str, fields: dict[str, Any]) -> Iterator[Path]:
    """Write a sealed directory: yields a scratch folder; what lies in it afterwards is sealed and renamed to `path`.

    `fields` may be filled while the folder is written; it goes into the manifest. After an exception nothing is left.
    If another attempt of the same run was faster, its directory stays and this one is dropped.
    Raises OutputExistsError if `path` holds something that this run key did not write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*"):  # by an attempt that was killed; the root's lock admits one job
        shutil.rmtree(left, ignore_errors=True)
    scratch = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}"
    scratch.mkdir()
    try:
        yield scratch
        _seal(scratch, kind, run_key, fields)
        try:
            os.rename(scratch, path)
        except OSError:
            if not is_sealed(path, kind, run_key):
                raise
        _fsync_directory(path.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def is_sealed(path: Path, kind: str, run_key: str) -> bool:
    """True if this run already wrote `path`, False if nothing is there. Raises OutputExistsError otherwise."""
    if not path.exists():
        return False
    fix = f"move {path} away, or use another storage.root"
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError):
        raise OutputExistsError(f"{path} exists but is not a {kind} that recray wrote", fix) from None
    if manifest.get("kind") != kind or manifest.get("run_key") != run_key:
        raise OutputExistsError(f"{path} belongs to {manifest.get('kind')} run {manifest.get('run_key')}, not to {kind} run {run_key}", fix)
    return True


def open_sealed(path: Path, kind: str, *, verify: bool = True) -> dict[str, Any]:
    """Manifest of a sealed directory; with `verify`, after every file was checked against its digest.

    Raises MissingArtifactError, DamagedArtifactError (naming the file).
    """
    if not (path / MANIFEST).is_file():
        raise MissingArtifactError(f"no {kind} at {path}", f"run the job that writes the {kind}, or check storage.root")
    manifest: dict[str, Any] = read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("sha256") != _content_digest(manifest):
        raise DamagedArtifactError(f"{kind} {path.name}: {MANIFEST} differs from its digest", f"remove {path} and repeat the job that wrote it")
    if manifest.get("kind") != kind or manifest.get("format_version") != FORMAT_VERSION:
        raise DamagedArtifactError(
            f"{path} is {manifest.get('kind')} format {manifest.get('format_version')}, not {kind} format {FORMAT_VERSION}",
            "read it with the version of recray that wrote it",
        )
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != entry["bytes"] or (verify and sha256_file(file) != entry["sha256"]):
            raise DamagedArtifactError(
                f"{kind} {path.name}: {name} differs from the digest in its manifest",
                f"remove {path} and repeat the job that wrote it",
            )
    return manifest


def manifest_digest(path: Path) -> str:
    """sha256 of a sealed directory's manifest: it names the whole content."""
    return sha256_file(path / MANIFEST)


def _seal(directory: Path, kind: str, run_key: str, fields: dict[str, Any]) -> None:
    files = {}
    for file in sorted(p for p in directory.rglob("*") if p.is_file()):
        with open(file, "rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
            os.fsync(handle.fileno())
        files[file.relative_to(directory).as_posix()] = {"sha256": digest, "bytes": file.stat().st_size}
    content = {**fields, "format_version": FORMAT_VERSION, "kind": kind, "run_key": run_key, "files": files}
    write_json(directory / MANIFEST, {**content, "sha256": _content_digest(content)})


def _content_digest(manifest: dict[str, Any]) -> str:
    """sha256 of a manifest without its own digest, as canonical JSON."""
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _fsync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
