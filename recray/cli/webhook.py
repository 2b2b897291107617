"""Tells somebody that a job did not succeed: its result as JSON to `report.webhook`."""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import urllib.request

from recray.config import load_settings
from recray.errors import RecrayError
from recray.stages import JobResult

JOBS = ("collect", "prepare", "train", "evaluate", "promote", "tune", "score", "report", "nightly", "adapt")
TIMEOUT_S = 10.0


def notify(arguments: argparse.Namespace, result: JobResult) -> None:
    """POST the result of a job that failed or was refused; a warning on standard error where nobody takes it.

    Chat services show its field `text`.
    """
    if arguments.job not in JOBS or result.status in ("ok", "skipped"):
        return
    try:
        url = load_settings(arguments.config, arguments.overrides).report.webhook
    except RecrayError:  # the settings are what failed
        return
    if url is None:
        return
    body = {"text": f"recray {result.job} {result.status}: {result.reason}", **json.loads(result.to_json())}
    headers = {"Content-Type": "application/json"}
    try:
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT_S):
            pass
    except (OSError, ValueError, http.client.HTTPException) as error:
        print(f"warning: report.webhook does not take the result: {error}", file=sys.stderr)
