"""Places under `storage.root`, and the one way in which recray writes a directory that others read.

A sealed directory is immutable. It is written beside its final place, every file is fsynced, `manifest.json` (format
version, kind, sha256 of every file, and the writer's fields) comes last, and one rename makes it visible. A reader
therefore sees all of it or nothing, whatever was killed when. Files that change (`LATEST.json`) are replaced by rename.

Between two durable steps lies a commit point (`recray.lease.commit_point`), where a test can end the process: `bundle:written`
(the files are there), `bundle:sealed` (so is the manifest) and `bundle:visible` (renamed) of each kind of directory;
`written` and `visible` of `RELEASE.json`, of `LATEST.json`, and of the files of a folder (`nights:written`).
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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from recray import lease
from recray.errors import DamagedArtifactError, MissingArtifactError, OutputExistsError, StorageError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
DIGEST_THREADS = 4


class Storage:
    """The folders under one `storage.root`."""

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
        """Vectors of the texts that a sentence encoder (its digest) was given so far."""
        return self.root / "sentences" / f"{encoder[:16]}.parquet"

    @property
    def collected(self) -> Path:
        """What the endpoint was told, a folder for each stretch of its log."""
        return self.root / "collected"

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

    def night(self, key: str) -> Path:
        """The settings with which a night was begun, and whether it ended."""
        return self.root / "nights" / f"{key}.json"

    @property
    def outbox(self) -> Path:
        """What MLflow is to be told, and what it was told."""
        return self.root / "tracked"

    @property
    def tracking(self) -> Path:
        return self.root / "mlflow"


NO_ROOM = {
    errno.ENOSPC: "No space left on device",
    errno.EDQUOT: "Disk quota exceeded",
    errno.EROFS: "Read-only file system",
    errno.EACCES: "Permission denied",
    errno.EIO: "Input/output error",
}


def no_room(error: BaseException | None) -> int | None:
    """The errno if the error, or what caused it, is a disk that takes nothing (`NO_ROOM`); else None.

    Libraries that write from native code leave only the message of the system, so that is looked at too.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        for number, text in NO_ROOM.items():
            if (isinstance(error, OSError) and error.errno == number) or text.lower() in str(error).lower():
                return number
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return None


def blamed(error: BaseException | None) -> str | None:
    """The absolute path that the system named in the error or in what caused it; None if it named none."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and isinstance(error.filename, str) and error.filename.startswith("/"):
            return error.filename
        if isinstance(error, OSError) and (found := re.search(r"file '(/[^']+)'", str(error))):
            return found[1]
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return None


def storage_error(error: BaseException | None, root: Path) -> StorageError | None:
    """The error as a StorageError if it is one of a disk that takes nothing, else None."""
    number = no_room(error)
    if number is None:
        return None
    where = blamed(error)
    if where and not Path(where).is_relative_to(root):
        return StorageError(f"{where}: {NO_ROOM[number]}", "make room there and make it accessible, then repeat the job; it goes on where it stopped")
    fix = "free space or add some" if number in (errno.ENOSPC, errno.EDQUOT) else "make it writable again"
    return StorageError(f"storage.root {root}: {NO_ROOM[number]}", f"{fix}, then repeat the job; it goes on where it stopped")


def check_place(root: Path) -> None:
    """Raises StorageError where a root is no folder that this process may write to, nor can become one. Writes nothing."""
    there = next(path for path in (root, *root.parents) if path.exists() or path.is_symlink())
    if not there.is_dir():
        raise StorageError(f"storage.root {root}: {there} is no folder", "name another place, or move that file away")
    if not os.access(there, os.W_OK | os.X_OK):
        raise StorageError(f"storage.root {root}: {there} cannot be written to", "check its permissions and its mount, or name another place")


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
        raise DamagedArtifactError(f"{path} is not JSON: {error}", "remove it and repeat the job that wrote it") from None


@contextlib.contextmanager
def sealed_directory(path: Path, kind: str, run_key: str, fields: dict[str, Any]) -> Iterator[Path]:
    """Write a sealed directory: yields a scratch folder; what lies in it afterwards is sealed and renamed to `path`.

    `fields` may be filled while the folder is written; it goes into the manifest. After an exception nothing is left.
    If another attempt of the same run was faster, its directory stays and this one is dropped.
    Raises OutputExistsError if `path` holds something that this run key did not write, RefusedError if this attempt was
    fenced off.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with lease.commit():  # an attempt that was fenced off must not sweep away what the next one writes
        for left in path.parent.glob(f".{path.name}.*"):  # by an attempt that was killed; the lease admits one job
            shutil.rmtree(left, ignore_errors=True)
    scratch = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}"
    scratch.mkdir()
    try:
        yield scratch
        lease.commit_point(f"{kind}:written")
        _seal(scratch, kind, run_key, fields)
        lease.commit_point(f"{kind}:sealed")
        with lease.commit():
            try:
                os.rename(scratch, path)
            except OSError:
                if not is_sealed(path, kind, run_key):
                    raise
        lease.commit_point(f"{kind}:visible")
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


def open_sealed(path: Path, kind: str, *, verify: bool | Callable[[str], bool] = True) -> dict[str, Any]:
    """Manifest of a sealed directory; with `verify`, after every file (or those whose name it accepts) was checked against its digest.

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
    files = manifest["files"]
    damaged = [name for name, entry in files.items() if not (path / name).is_file() or (path / name).stat().st_size != entry["bytes"]]
    if not damaged:
        read = [name for name in files if (verify(name) if callable(verify) else verify)]
        with ThreadPoolExecutor(DIGEST_THREADS) as pool:  # hashing leaves Python to the others
            same = list(pool.map(lambda name: bool(sha256_file(path / name) == files[name]["sha256"]), read))
        damaged = [name for name, good in zip(read, same, strict=True) if not good]
    if damaged:
        raise DamagedArtifactError(
            f"{kind} {path.name}: {damaged[0]} differs from the digest in its manifest",
            f"remove {path} and repeat the job that wrote it",
        )
    return manifest


def manifest_digest(path: Path) -> str:
    """sha256 of a sealed directory's manifest: it names the whole content."""
    return sha256_file(path / MANIFEST)


def reseal(directory: Path) -> None:
    """Seal a directory anew whose files were changed; nothing happens where all have their digests."""
    manifest = read_json(directory / MANIFEST)
    names = {file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file() and file.name != MANIFEST}
    files = manifest["files"]
    if names == files.keys() and all(sha256_file(directory / name) == entry["sha256"] for name, entry in files.items()):
        return
    fields = {name: value for name, value in manifest.items() if name not in ("format_version", "kind", "run_key", "files", "sha256")}
    _seal(directory, manifest["kind"], manifest["run_key"], fields)


def _seal(directory: Path, kind: str, run_key: str, fields: dict[str, Any]) -> None:
    files = {}
    for file in sorted(p for p in directory.rglob("*") if p.is_file() and p != directory / MANIFEST):
        with open(file, "rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
            os.fsync(handle.fileno())
        files[file.relative_to(directory).as_posix()] = {"sha256": digest, "bytes": file.stat().st_size}
    content = {**fields, "format_version": FORMAT_VERSION, "kind": kind, "run_key": run_key, "files": files}
    write_json(directory / MANIFEST, {**content, "sha256": _content_digest(content)})


def _file_point(path: Path, state: str) -> None:
    """Commit point of a file: named by itself if it is a pointer, else by its folder."""
    lease.commit_point(f"{path.name if path.stem.isupper() else path.parent.name}:{state}")


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
