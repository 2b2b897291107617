"""Text columns of kind `sentence`: prepare computes one vector per item with a sentence encoder.

The encoder is a folder that sentence-transformers reads, or an installed package that contains one (the extra
`recray[text]`). Each text is encoded alone, so its vector does not depend on the others. Vectors are cached
in the workspace by the hash of the text, so a nightly run encodes only new texts.
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

from recray.config import expand_path
from recray.errors import DamagedArtifactError, SettingsError
from recray.storage import sha256_file

INSTALL_HINT = (
    'pip install "recray[text]", or name the folder of a sentence-transformers model in data.text_encoder'
)


def find_encoder(name: str) -> Path:
    """The folder of an encoder: `name` itself, or `model` in the installed package of that name. Raises
    SettingsError.
    """
    folder = expand_path(name, "data.text_encoder")
    if not folder.is_dir():
        try:
            spec = importlib.util.find_spec(name.replace("-", "_"))
        except (ImportError, ValueError):
            spec = None
        locations = [] if spec is None else list(spec.submodule_search_locations or [])
        folder = Path(locations[0]) / "model" if locations else folder
    if not (folder / "modules.json").is_file():
        raise SettingsError(
            f"data.text_encoder: {name!r} is neither a folder with a model nor a package that contains one",
            INSTALL_HINT,
        )
    if importlib.util.find_spec("sentence_transformers") is None:
        raise SettingsError(
            "a feature of kind sentence needs sentence-transformers, which is not installed", INSTALL_HINT
        )
    return folder


def digest_encoder(folder: Path) -> str:
    """sha256 over the names and contents of the encoder's files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    text = "".join(f"{path.relative_to(folder)} {sha256_file(path)}\n" for path in files)
    return hashlib.sha256(text.encode()).hexdigest()


def encode_sentences(column: pa.ChunkedArray, folder: Path, cache_file: Path) -> pa.Array:
    """A vector for each text of a column, list<float32> [n]; null for a missing or empty text.

    cache_file : Parquet file of cached vectors, read and replaced
    """
    texts = [(text or "").strip() for text in column.to_pylist()]
    hashes = [hashlib.sha256(text.encode()).hexdigest()[:32] if text else None for text in texts]
    vectors = _read_vectors(cache_file)
    missing = {
        key: text for key, text in zip(hashes, texts, strict=True) if key is not None and key not in vectors
    }
    if missing:
        vectors |= encode_each(missing, folder)
        _write_vectors(cache_file, vectors)
    return pa.array([None if key is None else vectors[key] for key in hashes], pa.list_(pa.float32()))


def encode_each(texts: dict[str, str], folder: Path) -> dict[str, np.ndarray]:
    """Vectors float32 of texts by their key, by the encoder in a folder."""
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    return {
        key: model.encode([text], show_progress_bar=False)[0].astype(np.float32)
        for key, text in texts.items()
    }


def _read_vectors(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        return {}
    try:
        table = pq.read_table(path)
        return dict(zip(table["key"].to_pylist(), table["vector"].to_numpy(), strict=True))
    except (pa.ArrowInvalid, KeyError, OSError) as error:
        raise DamagedArtifactError(
            f"{path} cannot be read: {error}", "remove it: the texts are encoded again"
        ) from None


def _write_vectors(path: Path, vectors: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        pq.write_table(
            pa.table(
                {"key": list(vectors), "vector": pa.array(list(vectors.values()), pa.list_(pa.float32()))}
            ),
            scratch,
        )
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
