"""From files in other tools' layouts to the first served recommendation, by three commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as pq

from recray.benchmark import Result
from recray.benchmark.data import find_data
from recray.benchmark.serve import running_serve
from recray.client import Client
from recray.errors import ClusterError
from recray.stages import ProgressLog
from recray.storage import Storage


@dataclass(frozen=True)
class Layout:
    """A log, and an item table where its layout has one, written from a data set."""

    data: str
    write: Callable[[Path, Path], list[Path]]


def measure_adopt(folder: Path, progress: ProgressLog) -> Result:
    """For each layout: seconds of `recray init --from-data`, of `recray nightly` with what it wrote, and of
    `recray serve` to the first recommendation; their sum; NDCG@10 of the model and of the best baseline, and
    whether the model serves.

    The files are made from the data sets under $RECRAY_DATA. Nothing is edited between the commands.
    """
    metrics: Result = {}
    for name, layout in LAYOUTS.items():
        layout_folder = folder / name
        layout_folder.mkdir()
        files = layout.write(find_data(layout.data), layout_folder)
        metrics[name] = _adopt(layout_folder, files)
        progress(f"{name}: {json.dumps(metrics[name])}")
    return metrics


def _adopt(layout_folder: Path, files: Sequence[Path]) -> Result:
    config, root = layout_folder / "recray.yaml", layout_folder / "workspace"
    result: Result = {"bytes": sum(path.stat().st_size for path in files)}
    started = time.monotonic()
    _run(["init", str(config), "--from-data", *map(str, files), f"storage.root={root}"])
    result["init_s"] = round(time.monotonic() - started, 1)
    last = json.loads(_run(["nightly", "--config", str(config)]).splitlines()[-1])
    result["nightly_s"] = round(time.monotonic() - started - result["init_s"], 1)
    (user,) = pq.read_table(next(root.glob("scores/dt=*/run=*/part-*.parquet")), columns=["user_id"])[0][:1]
    with running_serve(Storage(root), {}, "--config", str(config)) as port:
        with Client(f"http://127.0.0.1:{port}") as client:
            response: Any = client.recommend(user_id=user.as_py(), k=10)
        result["total_s"] = round(time.monotonic() - started, 1)
    result["items"], result["source"] = len(response["items"]), response["source"]
    result["promoted"] = last["metrics"].get("promoted")
    table = json.loads((Path(last["outputs"]["evaluation"]) / "metrics.json").read_text())
    for setting, rows in table.items():
        if isinstance(rows, dict) and "recray" in rows:
            others = {
                baseline: row["ndcg@10"]
                for baseline, row in rows.items()
                if baseline != "recray" and "ndcg@10" in row
            }
            best = max(others, key=lambda baseline: others[baseline])
            result[setting] = {"ndcg@10": round(rows["recray"]["ndcg@10"], 4), best: round(others[best], 4)}
    return result


def _run(words: Sequence[str]) -> str:
    """The standard output of a command. Raises ClusterError where it fails."""
    command = [sys.executable, "-m", "recray.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    if done.returncode:
        raise ClusterError(
            f"recray {words[0]} ended with exit code {done.returncode}: {done.stderr[-800:]}",
            "run it manually to see why",
        )
    return done.stdout


def _write_retail(data: Path, layout_folder: Path) -> list[Path]:
    """One CSV as the UCI repository has it: no item table, 12/1/2010 8:26, some rows without a customer."""
    events = pq.read_table(data / "interactions.parquet")
    items = pq.read_table(data / "items.parquet", columns=["item_id", "title"])
    titles = dict(zip(items["item_id"].to_pylist(), items["title"].to_pylist(), strict=True))
    times = [
        f"{at.month}/{at.day}/{at.year} {at.hour}:{at.minute:02}" for at in events["timestamp"].to_pylist()
    ]
    columns = {
        "InvoiceNo": events["invoice_no"],
        "StockCode": events["item_id"],
        "Description": pa.array([titles.get(item) for item in events["item_id"].to_pylist()]),
        "Quantity": events["quantity"],
        "InvoiceDate": pa.array(times),
        "UnitPrice": events["unit_price"],
        "CustomerID": events["user_id"],
        "Country": events["country"].cast(pa.string()),
    }
    csv.write_csv(pa.table(columns), layout_folder / "Online Retail.csv")
    return [layout_folder / "Online Retail.csv"]


def _write_personalize(data: Path, layout_folder: Path) -> list[Path]:
    """Interactions and items of a shop as Amazon Personalize takes them: upper case, seconds since 1970."""
    events = pq.read_table(data / "interactions.parquet")
    seconds = pc.divide(events["timestamp"].cast(pa.int64()), 1000)
    columns = {
        "USER_ID": events["user_id"],
        "ITEM_ID": events["item_id"],
        "TIMESTAMP": seconds,
        "EVENT_TYPE": events["event"].cast(pa.string()),
        "EVENT_VALUE": events["value"],
    }
    csv.write_csv(pa.table(columns), layout_folder / "interactions.csv")
    items = pq.read_table(data / "items.parquet")
    columns = {
        "ITEM_ID": items["item_id"],
        "CATEGORY_L1": items["department"].cast(pa.string()),
        "CATEGORY_L2": items["category"].cast(pa.string()),
        "BRAND": items["brand"].cast(pa.string()),
        "PRICE": items["price"],
        "PRODUCT_DESCRIPTION": items["title"],
    }
    csv.write_csv(pa.table(columns), layout_folder / "items.csv")
    return [layout_folder / "interactions.csv", layout_folder / "items.csv"]


def _write_recbole(data: Path, layout_folder: Path) -> list[Path]:
    """Atomic files of RecBole: tabs, and the type behind each column's name."""
    events = pq.read_table(data / "interactions.parquet", columns=["user_id", "item_id", "value"])
    times = pq.read_table(data / "timestamps.parquet", columns=["user_id", "item_id", "timestamp"])
    events = events.join(times, ["user_id", "item_id"], join_type="inner")
    options = csv.WriteOptions(delimiter="\t", quoting_style="none")
    columns = {
        "user_id:token": events["user_id"],
        "item_id:token": events["item_id"],
        "rating:float": events["value"],
        "timestamp:float": pc.divide(events["timestamp"].cast(pa.int64()), 1000),
    }
    csv.write_csv(pa.table(columns), layout_folder / "ml-1m.inter", options)
    items = pq.read_table(data / "items.parquet", columns=["item_id", "title", "year", "genres"])
    columns = {
        "item_id:token": items["item_id"],
        "movie_title:token_seq": items["title"],
        "release_year:token": items["year"],
        "genre:token_seq": pa.array([" ".join(genres or []) for genres in items["genres"].to_pylist()]),
    }
    csv.write_csv(pa.table(columns), layout_folder / "ml-1m.item", options)
    return [layout_folder / "ml-1m.inter", layout_folder / "ml-1m.item"]


LAYOUTS = {
    "uci": Layout("online-retail", _write_retail),
    "personalize": Layout("complete-journey", _write_personalize),
    "recbole": Layout("ml-1m", _write_recbole),
}
