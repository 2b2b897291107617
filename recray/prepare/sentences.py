"""Text columns of kind `sentence`: one vector an item from a sentence encoder, made once when the data is prepared.

The encoder is a folder that sentence-transformers reads, or an installed package that carries one (the extra `recray[text]`).
A text is encoded alone, so that its vector does not depend on what else is encoded; vectors are kept under the storage root by
the text's hash, so that a night encodes what is new.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recray.config import expanded
from recray.errors import DamagedArtifactError, SettingsError
from recray.storage import sha256_file

EXTRA = 'pip install "recray[text]", or name the folder of a sentence-transformers model in data.text_encoder'


def find_encoder(name: str) -> Path:
    """The folder of an encoder: `name` itself, or `model` in the installed package of that name. Raises SettingsError."""
    folder = expanded(name, "data.text_encoder")
    if not folder.is_dir():
        try:
            found = importlib.util.find_spec(name.replace("-", "_"))
        except (ImportError, ValueError):
            found = None
        places = [] if found is None else list(found.submodule_search_locations or [])
        folder = Path(places[0]) / "model" if places else folder
    if not (folder / "modules.json").is_file():
        raise SettingsError(f"data.text_encoder: {name!r} is neither a folder with a model nor a package that carries one", EXTRA)
    if importlib.util.find_spec("sentence_transformers") is None:
        raise SettingsError("a feature of kind sentence needs sentence-transformers, which is not installed", EXTRA)
    return folder


def digest_encoder(folder: Path) -> str:
    """sha256 over the names and contents of the encoder's files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    text = "".join(f"{path.relative_to(folder)} {sha256_file(path)}\n" for path in files)
    return hashlib.sha256(text.encode()).hexdigest()


def encode_sentences(column: pa.ChunkedArray, folder: Path, kept: Path) -> pa.Array:
    """A vector for each text of a column, list<float32> [n]; null for a text that is missing or empty.

    kept : Parquet file of the vectors made so far, read and replaced
    """
    texts = [(text or "").strip() for text in column.to_pylist()]
    hashes = [hashlib.sha256(text.encode()).hexdigest()[:32] if text else None for text in texts]
    known = _read(kept)
    missing = {key: text for key, text in zip(hashes, texts, strict=True) if key is not None and key not in known}
    if missing:
        known |= _encode(missing, folder)
        _write(kept, known)
    return pa.array([None if key is None else known[key] for key in hashes], pa.list_(pa.float32()))


def _encode(texts: dict[str, str], folder: Path) -> dict[str, np.ndarray]:
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    return {key: model.encode([text], show_progress_bar=False)[0].astype(np.float32) for key, text in texts.items()}


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        return {}
    try:
        table = pq.read_table(path)
        return dict(zip(table["key"].to_pylist(), table["vector"].to_numpy(), strict=True))
    except (pa.ArrowInvalid, KeyError, OSError) as error:
        raise DamagedArtifactError(f"{path} cannot be read: {error}", "remove it; the texts will be encoded again") from None


def _write(path: Path, known: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        pq.write_table(pa.table({"key": list(known), "vector": pa.array(list(known.values()), pa.list_(pa.float32()))}), scratch)
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
