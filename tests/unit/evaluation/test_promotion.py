"""The gate, the flip of RELEASE.json, the way back, and the report of it all; on real bundles of untrained
weights.
"""

import json
import re
import shutil

import numpy as np
import pytest
import yaml
from conftest import synthetic_overrides

from recray.bundle import Bundle
from recray.config import load_settings
from recray.errors import DamagedArtifactError, MissingArtifactError, RefusedError
from recray.evaluation import criteria, promotion
from recray.evaluation.evaluate import evaluate, evaluate_key
from recray.inference import Predictor
from recray.privacy.accounting import Mechanism
from recray.privacy.ledger import Ledger
from recray.release import Member, Release, load_champion, require_private, roll_back
from recray.report import page as report
from recray.storage import Storage, write_json
from recray.testing.published import prepare_here, untrained_bundle
from recray.testing.synthetic import SyntheticShop


@pytest.fixture(scope="module")
def shop(tmp_path_factory, synthetic_folder):
    """Settings, storage, dataset and three bundles that differ in their seed."""
    root = tmp_path_factory.mktemp("shop")
    overrides = [
        *synthetic_overrides(synthetic_folder, root),
        "promotion.must_beat=[]",
        "promotion.consistency_users=32",
    ]
    settings = load_settings(None, overrides)
    dataset, storage, bundles = prepare_here(settings), Storage(root), []
    for seed in range(3):
        other = load_settings(None, [*overrides, f"train.seed={seed}"])
        bundles.append(untrained_bundle(other, dataset, storage.bundle(f"b{seed}"), f"b{seed}"))
    return settings, storage, dataset, bundles


@pytest.fixture
def fresh(shop):
    """The shop with no release and no promotion."""
    shop[1].release.unlink(missing_ok=True)
    shutil.rmtree(shop[1].root / "promotions", ignore_errors=True)
    return shop


def with_gates(settings, **changes):
    return settings.model_copy(update={"promotion": settings.promotion.model_copy(update=changes)})


def test_the_first_bundle_that_passes_is_the_champion_and_asking_again_changes_nothing(fresh):
    settings, storage, dataset, (bundle, *_) = fresh
    key, decision, changed = promotion.promote(settings, dataset, bundle)
    assert changed and decision["promoted"] and decision["champion"] is None
    assert Release.read(storage) == Release(champion=Member.of(bundle), decision=key)
    assert load_champion(storage).key == bundle.key
    before = storage.release.read_bytes()
    assert promotion.promote(settings, dataset, bundle) == (key, decision, False)
    assert storage.release.read_bytes() == before


def test_a_baseline_that_is_not_beaten_refuses_in_words(fresh):
    settings, storage, dataset, (bundle, *_) = fresh
    settings = with_gates(settings, must_beat=("item-kNN",))
    settings = settings.model_copy(
        update={"evaluate": settings.evaluate.model_copy(update={"protocol": "filter_seen"})}
    )
    _, decision, _ = promotion.promote(settings, dataset, bundle)
    assert not decision["promoted"] and "item-kNN" in decision["reason"] and "NDCG@10" in decision["reason"]
    assert Release.read(storage).champion is None and Release.read(storage).challenger == Member.of(bundle)
    with pytest.raises(RefusedError, match="no bundle of .* was promoted yet"):
        load_champion(storage)


def test_a_challenger_is_measured_against_the_champion_on_the_same_users(fresh):
    settings, storage, dataset, (first, second, _) = fresh
    promotion.promote(settings, dataset, first)
    strict = with_gates(settings, margin=0.0)
    _, decision, _ = promotion.promote(strict, dataset, second)
    comparison = decision["comparison"]
    ndcg = [
        evaluate(settings, evaluate_key(settings, dataset, b), dataset, b)["with_repeats"]["recray"][
            "ndcg@10"
        ]
        for b in (first, second)
    ]
    assert comparison["difference"] == pytest.approx(ndcg[1] - ndcg[0], abs=1e-12)
    assert comparison["low"] <= comparison["difference"] <= comparison["high"]
    assert decision["promoted"] == (comparison["low"] > 0)
    generous = with_gates(settings, margin=1.0)
    key, decision, _ = promotion.promote(generous, dataset, second)
    release = Release.read(storage)
    assert (
        decision["promoted"]
        and release.champion == Member.of(second)
        and release.previous == Member.of(first)
        and release.decision == key
    )
    assert promotion.promote(generous, dataset, second)[1] == decision, (
        "the champion finds the decision that made it"
    )


def test_rolled_back_the_old_champion_returns_and_the_new_one_only_by_hand(fresh):
    settings, storage, dataset, (first, second, third) = fresh
    settings = with_gates(settings, margin=1.0)
    with pytest.raises(RefusedError, match="no previous champion"):
        roll_back(storage)
    promotion.promote(settings, dataset, first)
    promotion.promote(settings, dataset, second)
    release = roll_back(storage)
    assert (
        release.champion == Member.of(first)
        and release.rolled_back == (second.key,)
        and release == Release.read(storage)
    )
    _, decision, changed = promotion.promote(settings, dataset, second)
    assert (
        not changed
        and "was rolled back" in decision["reason"]
        and f"recray promote {second.key}" in decision["reason"]
    )
    assert promotion.promote(settings, dataset, third)[1]["promoted"]
    assert promotion.promote(settings, dataset, second, is_manual=True)[1]["promoted"]
    assert Release.read(storage).rolled_back == ()


def test_a_release_that_points_nowhere_or_at_something_else_is_named(fresh):
    settings, storage, dataset, (first, second, _) = fresh
    promotion.promote(settings, dataset, first)
    dangling = first.path.with_name("away")
    first.path.rename(dangling)
    try:
        with pytest.raises(
            MissingArtifactError, match=f"RELEASE.json names bundle {first.key}.*\n.*recray promote KEY"
        ):
            promotion.promote(settings, dataset, second)
        shutil.copytree(second.path, first.path)
        with pytest.raises(DamagedArtifactError, match="not the one that RELEASE.json names"):
            load_champion(storage)
    finally:
        shutil.rmtree(first.path)
        dangling.rename(first.path)
    storage.release.write_text('{"format_version": 1}')
    with pytest.raises(DamagedArtifactError, match="is not a release"):
        Release.read(storage)


def test_a_bundle_of_other_data_is_refused(fresh, tmp_path):
    settings, _, dataset, (bundle, *_) = fresh
    SyntheticShop(users=100, items=60, events_per_user=15, seed=9).write(tmp_path / "other")
    other = load_settings(None, synthetic_overrides(tmp_path / "other", tmp_path / "root"))
    check = criteria.check_same_data(prepare_here(other), bundle, tmp_path / "gone")
    assert check.passed, "the same names: only what is not shared can tell data apart"
    renamed = SyntheticShop(users=100, items=60, events_per_user=15, seed=9)
    renamed.write(tmp_path / "renamed")
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file in [
        *(tmp_path / "renamed" / "events").glob("*.parquet"),
        tmp_path / "renamed" / "items.parquet",
    ]:
        table = pq.read_table(file)
        ids = pa.array([f"film-{name}" for name in table["item_id"].to_pylist()])
        pq.write_table(table.set_column(table.column_names.index("item_id"), "item_id", ids), file)
    stranger = prepare_here(load_settings(None, synthetic_overrides(tmp_path / "renamed", tmp_path / "root")))
    check = criteria.check_same_data(stranger, bundle, tmp_path / "gone")
    assert not check.passed and "0 of the 120 items" in check.text and "another dataset" in check.text
    check = criteria.check_same_data(dataset, bundle, stranger.path)
    assert not check.passed and "another digest" in check.text


def test_a_champion_that_may_know_the_targets_is_not_compared(fresh):
    settings, _, dataset, (bundle, *_) = fresh
    assert criteria.explain_incomparable(dataset, bundle) is None
    other = Bundle(bundle.path, {**bundle.manifest, "dataset_digest": "x"})
    assert criteria.explain_incomparable(dataset, other) is None
    late = Bundle(bundle.path, {**other.manifest, "trained_until_s": dataset.cut_s("test") + 1})
    assert "after the test cutoff" in criteria.explain_incomparable(dataset, late)
    split = Bundle(bundle.path, {**other.manifest, "split_kind": "leave_one_out"})
    assert "under another split" in criteria.explain_incomparable(dataset, split)
    check, comparison = criteria.check_champion(settings, dataset, late, np.zeros(0))
    assert check.passed and "not compared" in check.text and comparison == {}


def test_the_consistency_check_finds_a_predictor_that_differs_in_a_batch(fresh):
    settings, _, dataset, (bundle, *_) = fresh
    predictor = Predictor.load(bundle.path, dataset=dataset)
    check = criteria.check_consistency(settings, dataset, predictor)
    assert check.passed and "scores of 32 users" in check.text
    whole = predictor.recommend
    predictor.recommend = lambda histories, k, **options: whole(
        histories, k, **{**options, "now": dataset.as_of_s - len(histories) * 86_400 * 30}
    )
    assert not criteria.check_consistency(settings, dataset, predictor).passed


def test_the_report_shows_everything_and_is_the_same_in_two_roots(fresh, tmp_path):
    settings, storage, dataset, (bundle, *_) = fresh
    with pytest.raises(MissingArtifactError, match="recray evaluate"):
        report.write_report(
            load_settings(None, [*yaml_overrides(settings), "evaluate.bootstrap=101"]), dataset, bundle
        )
    promotion.promote(settings, dataset, bundle)
    key, path, skipped = report.write_report(settings, dataset, bundle)
    assert not skipped and report.write_report(settings, dataset, bundle) == (key, path, True)
    page, text = (path / "report.html").read_text(), (path / "report.md").read_text()
    for word in (
        "Nightly run of 2024-",
        "meets the promotion criteria",
        "item-kNN",
        "Ranking quality",
        "Segments",
        "Catalogue coverage",
        "coverage",
        "This run was not published",
    ):
        assert word in page and word in text, word
    assert (
        page.count("<svg") == 3
        and "src=" not in page
        and set(re.findall(r"https?://[\w.]+", page)) <= {"http://www.w3.org"}
    )
    assert str(storage.root) not in page + text
    twin = tmp_path / "twin"
    shutil.copytree(storage.root, twin)
    shutil.rmtree(twin / "reports")
    moved = load_settings(None, [*yaml_overrides(settings), f"storage.root={twin}"])
    _, other, _ = report.write_report(moved, dataset, bundle)
    assert {p.name: p.read_bytes() for p in other.iterdir()} == {
        p.name: p.read_bytes() for p in path.iterdir()
    }


def yaml_overrides(settings):
    """Settings as overrides, to change some of them."""
    return [f"{s}.{f}={yaml.safe_dump(v, default_flow_style=True).removesuffix('...' + chr(10)).strip()}"
            for s, fields in json.loads(settings.model_dump_json()).items() for f,
            v in fields.items()]  # fmt: skip


def test_where_privacy_is_on_only_a_private_bundle_that_the_ledger_knows_passes(fresh, monkeypatch):
    settings, storage, dataset, (bundle, *_) = fresh
    private = settings.model_copy(
        update={"privacy": settings.privacy.model_copy(update={"enabled": True, "cap": 1.0, "delta": 1e-5})}
    )
    decision = promotion.promote(private, dataset, bundle)[1]
    assert not decision["promoted"] and decision["reason"] == f"bundle {bundle.key} was not trained privately"
    monkeypatch.setattr(bundle, "privacy", {"differential_privacy": True})

    def reason():
        shutil.rmtree(storage.root / "promotions")
        return promotion.promote(private, dataset, bundle)[1]["reason"]

    assert "no ledger at" in reason()
    ledger = Ledger.open(private.ledger_url(), "users")
    ledger.reserve(
        bundle.key, Mechanism(sigma=2.0, rate=0.1, steps=100, clipping_norm=1.0, delta=1e-5, users=200), None
    )
    assert f"no training {bundle.key} that committed" in reason()
    ledger.take_steps(bundle.key, 100)
    ledger.commit(bundle.key)
    assert re.match(r"users spent ε \d\.\d+ at δ 1e-05 of 1", reason())
    private = private.model_copy(update={"privacy": private.privacy.model_copy(update={"cap": 9.0})})
    claim, check = (
        {"claim": 2.0, "verdict": "refuted"},
        {"name": "contribution", "passed": False, "text": "one user added 9"},
    )
    audit = {"settings_key": bundle.manifest["settings_key"], "claims": [claim], "checks": [check]}
    write_json(storage.audit("mine"), audit)
    assert reason().startswith(
        "audit mine: ε 2 is refuted; contribution: one user added 9; publish nothing of it"
    )
    write_json(storage.audit("mine"), {**audit, "settings_key": "of other trainings"})
    write_json(storage.audit("begun"), {"runs": {}})
    assert reason() == "" and Release.read(storage).champion.run_key == bundle.key


def test_where_privacy_is_on_nothing_else_is_published(fresh):
    settings, _, _, (bundle, *_) = fresh
    private = settings.model_copy(update={"privacy": settings.privacy.model_copy(update={"enabled": True})})
    with pytest.raises(RefusedError, match="trained without privacy"):
        require_private(private, bundle)
    require_private(settings, bundle)


def test_a_baseline_that_is_better_is_something_to_look_at():
    row = {"model_lead": -0.0123, "model_lead_low": -0.02, "model_lead_high": -0.001}
    rows = {
        "recray": {},
        "EASE": row,
        "item-kNN": {**row, "model_lead": 0.1},
        "personal frequency": {"skipped": "why"},
    }
    assert report.describe_better_baselines({"with_repeats": rows}, 10) == [
        "without seen-item filter: NDCG@10 is -0.0123 [-0.0200, -0.0010] against EASE, "
        "which is significantly better"
    ]
