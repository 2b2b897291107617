"""Whatever ends a job's process, somebody reports it."""

import json
import os
import signal
import subprocess
import sys

import pytest
from harness import wait_for
from processes import children, status

JOB = """
import atexit, os, signal, sys, time
from recray.cli.supervise import supervise

def job(tell):
    tell(f"child {{os.getpid()}}")
    {body}

def lost(what, fix):
    print("lost:", what, "/", fix, flush=True)
    return 1

sys.exit(supervise(job, lost))
"""


def start(body: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", JOB.format(body=body)], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("body", "code", "named"),
    [
        ("return 3", 3, ""),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            1,
            "signal 9 (SIGKILL), which the kernel sends when memory runs out",
        ),
        ("os.abort()", 1, "signal 6 (SIGABRT)"),
        ("os._exit(1)", 1, "lost the cluster's head node"),
        ("atexit.register(os.kill, os.getpid(), signal.SIGKILL); return 0", 0, ""),  # all was done, and said
        ("atexit.register(os.abort); return 3", 3, ""),
    ],
)
def test_an_end_without_a_word_is_reported(body, code, named):
    process = start(body)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code
    assert ("lost:" in out) == bool(named) and named in out


def test_a_request_to_end_reaches_the_job():
    body = """signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        tell("ready")
        while True:  # a signal that comes just before a long sleep would wait for its end
            time.sleep(0.05)
    except KeyboardInterrupt:
        return 7"""
    process = start(body)
    process.stdout.readline()
    process.stdout.readline()
    process.terminate()
    assert "lost" not in process.communicate(timeout=30)[0]
    assert process.returncode == 7


def test_what_others_print_goes_to_standard_error():
    body = (
        "print('python'); os.system('echo native'); tell('result'); atexit.register(print, 'late'); return 0"
    )
    process = subprocess.run(
        [sys.executable, "-c", JOB.format(body=body)], capture_output=True, text=True, timeout=60
    )
    assert process.stdout.splitlines()[1:] == ["result"]
    assert {"python", "native", "late"} <= set(process.stderr.split())


@pytest.mark.parametrize("closed", ["", "2>&-", "</dev/null >/dev/null"])
def test_a_caller_that_ignores_the_end_of_children_or_closed_a_descriptor(closed, tmp_path):
    script = tmp_path / "job.py"
    script.write_text(JOB.format(body="return 5"))
    command = f"exec {sys.executable} {script} {closed}"
    done = subprocess.run(
        ["bash", "-c", command], timeout=60, preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    )
    assert done.returncode == 5


def test_the_job_does_not_outlive_its_parent():
    process = start("time.sleep(60)")
    child = int(process.stdout.readline().split()[1])
    process.kill()
    process.wait()
    wait_for("the job to end", lambda: status(child) in ("gone", "zombie"))


def test_the_last_line_is_there_when_the_job_is_killed(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.serve", f"storage.root={tmp_path}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    (job,) = wait_for("the job", lambda: children(process.pid), ended=process.poll)
    os.kill(job, signal.SIGKILL)
    out, said = process.communicate(timeout=60)
    result = json.loads(out.splitlines()[-1])
    assert (process.returncode, result["job"], result["status"]) == (
        1,
        "serve",
        "failed",
    ) and "signal 9" in result["reason"]
    assert json.loads(said.splitlines()[-1])["level"] == "error"
