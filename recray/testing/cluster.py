"""A Ray cluster of one node on this machine, for tests and benchmarks."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from recray import cluster
from recray.errors import ClusterError


class Head:
    """A Ray cluster of one node on this machine, with token authentication, as a context manager.

    Parameters
    ----------
    home : its HOME, with its token
    cpus : logical CPUs of the node
    dashboard : whether jobs can be submitted to it

    `environment` is the environment of a process that connects to it, `temporary` the folder of Ray's logs.
    That folder is not shared: Ray would write the address of the latest cluster there, and connect the jobs
    of all others to it.
    """

    def __init__(self, home: Path, cpus: int = 2, *, dashboard: bool = True) -> None:
        self.home, self.cpus, self.takes_jobs = home, cpus, dashboard
        self.port, self.dashboard, *self._agent_ports = cluster.free_ports(
            4
        )  # other clusters may run on this machine
        base = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("RAY_") or name.startswith(("RAY_TRAIN_", "RAY_worker_"))
        }
        quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
        self.temporary = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short, for the paths of sockets
        quiet["RAY_TMPDIR"] = str(self.temporary)
        self._own = {
            **base,
            **quiet,
            "HOME": str(home),
            "RAY_AUTH_MODE": "token",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        addresses = {
            "RAY_ADDRESS": f"127.0.0.1:{self.port}",
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self.dashboard}",
        }
        self.environment = {**self._own, **addresses}

    def __enter__(self) -> Head:
        token = self.home / ".ray" / "auth_token"
        token.parent.mkdir(parents=True, exist_ok=True)
        if not token.exists():
            token.write_text(secrets.token_hex(32))
            token.chmod(0o600)
        self.start()
        return self

    def start(self) -> None:
        """Start it. Raises ClusterError."""
        arguments = [
            f"--port={self.port}",
            f"--dashboard-port={self.dashboard}",
            f"--num-cpus={self.cpus}",
            "--node-ip-address=127.0.0.1",
        ]
        arguments += [
            f"--dashboard-agent-listen-port={self._agent_ports[0]}",
            f"--ray-client-server-port={self._agent_ports[1]}",
        ]
        arguments += [
            "--object-store-memory",
            str(cluster.LOCAL_OBJECT_STORE_BYTES),
            "--disable-usage-stats",
            "--block",
        ]
        arguments += [
            "--include-log-monitor=false",
            f"--include-dashboard={self.takes_jobs}",
        ]  # output of workers is not sent to a driver
        with open(self.home / "head.log", "a") as log:
            command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", *arguments]
            self.process = subprocess.Popen(
                command, env=self._own, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 60
        while not all(map(_is_listening, (self.port, self.dashboard) if self.takes_jobs else (self.port,))):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise ClusterError(
                    f"the cluster did not start: {(self.home / 'head.log').read_text()[-400:]}",
                    "look at head.log in its home",
                )
            time.sleep(0.2)

    def __exit__(self, *_: object) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)  # its daemons ignore SIGTERM
        self.process.wait()
        shutil.rmtree(self.temporary, ignore_errors=True)


def _is_listening(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
