"""Paths of a workspace (`storage.root`), and the way to write its immutable, checksummed artifacts.

An artifact is a directory. It is written under a scratch name, and every file is fsynced. `manifest.json`
(format version, kind, sha256 of every file, and the writer's fields) comes last, and one rename makes it
visible. A reader sees all of it or nothing, whichever process was killed. Files that change (`LATEST.json`)
are replaced by rename.

Between two durable steps lies a commit point (`recray.storage.lease.commit_point`), where tests can kill the
process: `bundle:written` (the files exist), `bundle:complete` (the manifest too) and `bundle:visible`
(renamed) of each kind of artifact; `written` and `visible` of `RELEASE.json`, of `LATEST.json`, and of the
files of a folder (`nights:written`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from recray.config.formats import to_current_manifest
from recray.errors import DamagedArtifactError, MissingArtifactError, OutputExistsError, StorageError
from recray.storage import lease

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SNAPSHOT = "snapshot"
"""The kind of artifact that LATEST.json names."""
DIGEST_THREADS = 4

Manifest = dict[str, Any]
"""The content of an artifact's `manifest.json`: `format_version`, `kind`, `run_key`, `files` (path -> its
`sha256` and `bytes`), `sha256` of the manifest without this field, and the fields of its kind, which its
writer passes to `immutable_directory`.
"""


class Storage:
    """The paths of one workspace."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def dataset(self, key: str) -> Path:
        return self.root / "datasets" / key

    def bundle(self, key: str) -> Path:
        return self.root / "bundles" / key

    def policy(self, key: str) -> Path:
        return self.root / "policies" / key

    def evaluation(self, key: str) -> Path:
        return self.root / "evaluations" / key

    def quarantine(self, key: str) -> Path:
        return self.root / "quarantine" / key

    @property
    def staging(self) -> Path:
        """Scratch space of prepare; removed when it ends."""
        return self.root / "staging"

    def sentences(self, encoder: str) -> Path:
        """Vectors of the texts that a sentence encoder (named by its digest) has encoded."""
        return self.root / "sentences" / f"{encoder[:16]}.parquet"

    @property
    def collected(self) -> Path:
        """Events collected from the endpoint's event store, one folder for each part of it."""
        return self.root / "collected"

    @property
    def scores(self) -> Path:
        return self.root / "scores"

    @property
    def training_runs(self) -> Path:
        """Checkpoints of Ray Train, one folder for each run key."""
        return self.root / "training"

    @property
    def latest(self) -> Path:
        """The pointer to the published snapshot."""
        return self.root / "LATEST.json"

    def read_latest(self) -> tuple[Path, str]:
        """The published snapshot: its folder, and the sha256 that its manifest had. Raises
        DamagedArtifactError.
        """
        entry = read_json(self.latest)
        if not isinstance(entry, dict) or not {"snapshot", "manifest_sha256"} <= entry.keys():
            raise DamagedArtifactError(f"{self.latest} names no snapshot", "repeat `recray score`")
        return self.root / entry["snapshot"], entry["manifest_sha256"]

    @property
    def follow(self) -> Path:
        """What `recray adapt --follow` does."""
        return self.root / "follow.json"

    @property
    def release(self) -> Path:
        """The pointer to champion and challenger."""
        return self.root / "RELEASE.json"

    def promotion(self, key: str) -> Path:
        return self.root / "promotions" / key

    def report(self, key: str) -> Path:
        return self.root / "reports" / key

    def audit(self, key: str) -> Path:
        return self.root / "audits" / f"{key}.json"

    def search(self, key: str) -> Path:
        """The trials of a search, and its results."""
        return self.root / "searches" / key

    def nightly_run(self, key: str) -> Path:
        """The settings with which a nightly run was started, and whether it has finished."""
        return self.root / "nights" / f"{key}.json"

    @property
    def outbox(self) -> Path:
        """Entries queued for MLflow, and those that were delivered."""
        return self.root / "tracked"

    @property
    def tracking(self) -> Path:
        return self.root / "mlflow"


DISK_ERRORS = {
    errno.ENOSPC: "No space left on device",
    errno.EDQUOT: "Disk quota exceeded",
    errno.EROFS: "Read-only file system",
    errno.EACCES: "Permission denied",
    errno.EIO: "Input/output error",
}


def find_disk_errno(error: BaseException | None) -> int | None:
    """The errno if the error or one of its causes is a disk error (`DISK_ERRORS`), else None.

    Native libraries keep only the system's message, so messages are searched too.
    """
    for cause in _walk_causes(error):
        for number, text in DISK_ERRORS.items():
            if (isinstance(cause, OSError) and cause.errno == number) or text.lower() in str(cause).lower():
                return number
    return None


def find_failed_path(error: BaseException | None) -> str | None:
    """The absolute path that the error or one of its causes names, else None."""
    for cause in _walk_causes(error):
        if not isinstance(cause, OSError):
            continue
        if isinstance(cause.filename, str) and cause.filename.startswith("/"):
            return cause.filename
        if match := re.search(r"file '(/[^']+)'", str(cause)):
            return match[1]
    return None


def _walk_causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and its causes, each once."""
    visited: set[int] = set()
    while error is not None and id(error) not in visited:
        visited.add(id(error))
        yield error
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__


def to_storage_error(error: BaseException | None, root: Path) -> StorageError | None:
    """The error as a StorageError if it is a disk error, else None."""
    number = find_disk_errno(error)
    if number is None:
        return None
    path = find_failed_path(error)
    if path and not Path(path).is_relative_to(root):
        return StorageError(
            f"{path}: {DISK_ERRORS[number]}",
            "free space there and make it accessible, then repeat the job; it continues where it stopped",
        )
    fix = "free or add space" if number in (errno.ENOSPC, errno.EDQUOT) else "make it writable again"
    return StorageError(
        f"storage.root {root}: {DISK_ERRORS[number]}",
        f"{fix}, then repeat the job; it continues where it stopped",
    )


def check_workspace(root: Path) -> None:
    """Raises StorageError if a workspace is no writable folder and cannot become one. Writes nothing."""
    existing = next(path for path in (root, *root.parents) if path.exists() or path.is_symlink())
    if not existing.is_dir():
        raise StorageError(
            f"storage.root {root}: {existing} is no folder", "name another folder, or move that file away"
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise StorageError(
            f"storage.root {root}: {existing} cannot be written to",
            "check its permissions and its mount, or name another folder",
        )


def sha256_file(path: str | Path) -> str:
    """Hex sha256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def key_of(*parts: Any) -> str:
    """First 16 hex digits of the sha256 of the parts' canonical JSON."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_json(path: Path, content: Any) -> None:
    """Replace `path` by `content` atomically: a reader sees the old or the new file, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(scratch, "w") as file:
            json.dump(content, file, indent=2, sort_keys=True)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        _file_point(path, "written")
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    _file_point(path, "visible")
    _fsync_directory(path.parent)


def read_json(path: Path) -> Any:
    """Content of a JSON file. Raises MissingArtifactError or DamagedArtifactError."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise MissingArtifactError(f"{path} does not exist", "run the job that writes it first") from None
    except ValueError as error:
        raise DamagedArtifactError(
            f"{path} is not JSON: {error}", "remove it and repeat the job that wrote it"
        ) from None


@contextlib.contextmanager
def immutable_directory(path: Path, kind: str, run_key: str, fields: Mapping[str, Any]) -> Iterator[Path]:
    """Write an artifact: yields a scratch folder, then writes its manifest and renames it to `path`.

    `fields` may be filled while the folder is written; they go into the manifest. After an exception nothing
    remains. If another attempt of the same run was faster, its artifact stays and this one is dropped.
    Raises OutputExistsError if `path` was not written by this run key, RefusedError if this attempt was
    fenced off.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with lease.commit():  # an attempt that was fenced off must not remove what the next one writes
        # of killed attempts, since the lease admits one job
        for leftover in path.parent.glob(f".{path.name}.*"):
            shutil.rmtree(leftover, ignore_errors=True)

    scratch = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}"
    scratch.mkdir()
    try:
        yield scratch
        lease.commit_point(f"{kind}:written")
        _seal(scratch, kind, run_key, fields)
        lease.commit_point(f"{kind}:complete")
        with lease.commit():
            try:
                os.rename(scratch, path)
            except OSError:
                if not is_complete(path, kind, run_key):
                    raise
        lease.commit_point(f"{kind}:visible")
        _fsync_directory(path.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def is_complete(path: Path, kind: str, run_key: str) -> bool:
    """True if this run already wrote `path`, False if nothing is there. Raises OutputExistsError
    otherwise."""
    if not path.exists():
        return False
    fix = f"move {path} away, or use another storage.root"
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError):
        raise OutputExistsError(f"{path} exists but is not a {kind} that recray wrote", fix) from None
    if manifest.get("kind") != kind or manifest.get("run_key") != run_key:
        raise OutputExistsError(
            f"{path} belongs to {manifest.get('kind')} run {manifest.get('run_key')}, not to {kind} run "
            f"{run_key}",
            fix,
        )
    return True


def open_immutable(path: Path, kind: str, *, verify: bool | Callable[[str], bool] = True) -> Manifest:
    """Manifest of an artifact, under today's names.

    verify : check the digest of every file, or of those whose name it accepts

    Raises MissingArtifactError, DamagedArtifactError (naming the file).
    """
    manifest = read_manifest(path, kind)
    files = manifest["files"]
    damaged = [
        name
        for name, entry in files.items()
        if not (path / name).is_file() or (path / name).stat().st_size != entry["bytes"]
    ]
    if not damaged:
        names = [name for name in files if (verify(name) if callable(verify) else verify)]
        with ThreadPoolExecutor(DIGEST_THREADS) as pool:  # hashing releases the GIL
            are_same = list(
                pool.map(lambda name: bool(sha256_file(path / name) == files[name]["sha256"]), names)
            )
        damaged = [name for name, is_same in zip(names, are_same, strict=True) if not is_same]
    if damaged:
        raise DamagedArtifactError(
            f"{kind} {path.name}: {damaged[0]} differs from the digest in its manifest",
            f"remove {path} and repeat the job that wrote it",
        )
    return manifest


def read_manifest(path: Path, kind: str) -> Manifest:
    """Manifest of an artifact, under today's names; its files are not looked at.

    Raises MissingArtifactError, DamagedArtifactError.
    """
    if not (path / MANIFEST).is_file():
        raise MissingArtifactError(
            f"no {kind} at {path}", f"run the job that writes the {kind}, or check storage.root"
        )
    manifest: Manifest = read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("sha256") != _content_digest(manifest):
        raise DamagedArtifactError(
            f"{kind} {path.name}: {MANIFEST} differs from its digest",
            f"remove {path} and repeat the job that wrote it",
        )
    if manifest.get("kind") != kind or manifest.get("format_version") != FORMAT_VERSION:
        raise DamagedArtifactError(
            f"{path} is {manifest.get('kind')} format {manifest.get('format_version')}, not {kind} format "
            f"{FORMAT_VERSION}",
            "read it with the version of recray that wrote it",
        )
    return to_current_manifest(kind, manifest)


def manifest_digest(path: Path) -> str:
    """sha256 of an artifact's manifest, which identifies its whole content."""
    return sha256_file(path / MANIFEST)


def refresh_manifest(directory: Path) -> None:
    """Write the manifest of an artifact again after its files changed; does nothing if all digests match."""
    manifest = read_json(directory / MANIFEST)
    names = {
        file.relative_to(directory).as_posix()
        for file in directory.rglob("*")
        if file.is_file() and file.name != MANIFEST
    }
    files = manifest["files"]
    if names == files.keys() and all(
        sha256_file(directory / name) == entry["sha256"] for name, entry in files.items()
    ):
        return
    fields = {
        name: value
        for name, value in manifest.items()
        if name not in ("format_version", "kind", "run_key", "files", "sha256")
    }
    _seal(directory, manifest["kind"], manifest["run_key"], fields)


def _seal(directory: Path, kind: str, run_key: str, fields: Mapping[str, Any]) -> None:
    files = {}
    for file in sorted(p for p in directory.rglob("*") if p.is_file() and p != directory / MANIFEST):
        with open(file, "rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
            os.fsync(handle.fileno())
        files[file.relative_to(directory).as_posix()] = {"sha256": digest, "bytes": file.stat().st_size}
    content = {**fields, "format_version": FORMAT_VERSION, "kind": kind, "run_key": run_key, "files": files}
    write_json(directory / MANIFEST, {**content, "sha256": _content_digest(content)})


def _file_point(path: Path, state: str) -> None:
    """Commit point of a file: a pointer has its own name, another file that of its folder."""
    lease.commit_point(f"{path.name if path.stem.isupper() else path.parent.name}:{state}")


def _content_digest(manifest: Manifest) -> str:
    """sha256 of a manifest without its own digest, as canonical JSON."""
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _fsync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
