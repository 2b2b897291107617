"""What the tests themselves stand on: waiting for events, and what is said before the first test."""

import os
import socket
import subprocess
import sys

import harness
import preflight
import pytest
from harness import wait_for


def test_a_wait_ends_with_what_came_and_takes_errors_for_not_yet():
    answers = iter([OSError("refused"), ValueError("half"), None, 7])

    def look():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert wait_for("seven", look, every_s=0) == 7


def test_a_wait_that_fails_names_what_it_waited_for_and_what_it_saw_last(monkeypatch):
    with pytest.raises(AssertionError, match="waited for a server, but it ended; last seen: its log"):
        wait_for("a server", lambda: False, last_seen=lambda: "its log", ended=lambda: 1)
    with pytest.raises(AssertionError, match="but it ended; last seen: connection refused"):
        wait_for("a server", lambda: open_nothing(), ended=lambda: True)
    assert wait_for("what came just before the end", lambda: True, ended=lambda: 0)
    monkeypatch.setattr(harness, "DEADLINE_S", 0.0)
    with pytest.raises(AssertionError, match="waited for rain, but 0 s went by; last seen: sun"):
        wait_for("rain", lambda: False, last_seen=lambda: "sun")


def open_nothing():
    raise OSError("connection refused")


def problems_with(words):
    return [problem for problem in preflight.problems() if words in problem]


def test_a_full_disk_a_taken_port_and_what_an_aborted_run_left_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(preflight, "ENDS_IN_S", 0.0)
    assert problems_with("GiB free") == problems_with("something listens") == []
    monkeypatch.setattr(preflight, "NEEDED", {str(tmp_path): 1 << 60})
    (full,) = problems_with("GiB free")
    assert str(tmp_path) in full and "GiB free" in full and "TMPDIR" in full
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(preflight, "NOBODY_LISTENS", (port,))
        (taken,) = problems_with("something listens")
        assert f"127.0.0.1:{port}" in taken
    home = tmp_path / "pytest-of-somebody" / "pytest-3" / "home0"
    home.mkdir(parents=True)
    process = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env={**os.environ, "HOME": str(home)}
    )
    try:
        (home.parent / ".lock").write_text(str(os.getpid()))
        assert not [left for left in problems_with("kill -9") if str(process.pid) in left], "that run goes on"
        (home.parent / ".lock").unlink()
        (left,) = problems_with("kill -9")
        assert f"kill -9 {process.pid}" in left
    finally:
        process.communicate(b"\n")


def test_what_is_absent_is_skipped_but_never_in_ci(monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no Redis"):
        preflight.absent("no Redis")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no Redis; in CI"):
        preflight.absent("no Redis")
