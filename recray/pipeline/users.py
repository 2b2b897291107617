"""Jobs about one user: `forget` and `export` what is stored of them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from recray.config import Settings
from recray.events.log import Log
from recray.events.store import open_log, sqlite_file
from recray.pipeline import discard, erasure, hold_workspace
from recray.pipeline.export import export as export_user
from recray.release import list_bundles
from recray.stages import AsOf, JobResult, ProgressLog
from recray.storage import Storage


def forget(settings: Settings, as_of: AsOf, progress: ProgressLog = discard, *, user: str) -> JobResult:
    """Erase a user from the workspace and the endpoint's event store; nothing more of them is stored."""
    started = time.monotonic()
    with hold_workspace("forget", settings, progress) as context:
        with _event_store(settings) as log:
            erased = erasure.forget(context.storage, user, log)
        status = "on" if erased.new else "on, as before,"
        progress(
            f"the user is {status} the opt-out list: no event is kept, and responses are those "
            "of an unknown user"
        )
        progress(
            f"erased: {erased.log} entries of the endpoint's event store, {erased.rows} rows of collected "
            "and invalid events"
        )
        for path in erased.artifacts:
            progress(f"rewritten or removed: {path}", level="debug")
        remaining = len(list(list_bundles(context.storage)))
        if remaining:
            progress(
                f"what remains: the weights of {remaining} bundles, and aggregates published before, here "
                "and in MLflow; the next training learns nothing of the user. data.events is yours: the "
                "user's rows there are skipped from now on"
            )
        metrics = {
            "new": erased.new,
            "log_entries": erased.log,
            "rows": erased.rows,
            "bundles_that_remain": remaining,
        }
        seconds = round(time.monotonic() - started, 2)
        return JobResult("forget", "ok", metrics=metrics, seconds=seconds, warnings=context.warnings)


def export(
    settings: Settings, as_of: AsOf, progress: ProgressLog = discard, *, user: str, out: str | None = None
) -> JobResult:
    """Copy everything that is stored of a user to a file of JSON lines."""
    started = time.monotonic()
    file = Path(out or f"recray-export-{time.strftime('%Y%m%dT%H%M%S')}.jsonl")
    with _event_store(settings) as log:
        counts = export_user(Storage(settings.root()), user, log, file)
    for kind, count in sorted(counts.items()):
        progress(f"{kind}: {count}")
    progress(
        f"{counts.total()} records in {file}"
        if counts
        else f"nothing is stored of this user; {file} is empty"
    )
    progress("data.events is yours, and not included; weights and aggregates name no user")
    return JobResult(
        job="export",
        status="ok",
        outputs={"export": str(file)},
        metrics=dict(counts),
        seconds=round(time.monotonic() - started, 2),
    )


@contextlib.contextmanager
def _event_store(settings: Settings) -> Iterator[Log | None]:
    """The endpoint's event store, open during the context; None where there is none yet."""
    options, root = settings.serve, settings.root()
    if options.state == "sqlite" and not sqlite_file(root).exists():
        yield None
        return
    with contextlib.closing(open_log(options.state, root, options.keep_days)) as log:
        yield log
