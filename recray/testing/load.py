"""Load on an HTTP endpoint from a separate process, over several connections with one request at a time each.

Each connection sends its next request after the response (closed loop), or all together send at a fixed rate
(open loop, as long as a connection is free). It implements just enough HTTP/1.1 to be cheap compared with the
server that it measures.
"""

from __future__ import annotations

import json
import multiprocessing
import selectors
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

TIMEOUT_S = 30.0


@dataclass
class Load:
    """The result of a load.

    latency_s : of responses with status 200
    refused_s : latencies of responses with status 503
    other_statuses : number of responses by any other status, 0 for a closed connection
    bodies : of responses with status 200
    retry_after : number of responses with status 503 and a Retry-After header
    """

    seconds: float
    latency_s: np.ndarray
    refused_s: np.ndarray
    other_statuses: dict[int, int] = field(default_factory=dict)
    bodies: list[bytes] = field(default_factory=list)
    retry_after: int = 0

    @property
    def per_s(self) -> float:
        """Responses with status 200 a second."""
        return len(self.latency_s) / self.seconds

    def ms(self, percent: float) -> float:
        """A percentile of the latency, in milliseconds."""
        return float(np.percentile(self.latency_s, percent) * 1000) if len(self.latency_s) else float("nan")


def post(path: str, body: Mapping[str, Any]) -> bytes:
    """The bytes of a POST request."""
    content = json.dumps(body).encode()
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
        f"{len(content)}\r\n\r\n".encode()
        + content
    )


def load(
    port: int,
    requests: Sequence[bytes],
    clients: int,
    seconds: float,
    *,
    rate: float | None = None,
    keep: bool = False,
) -> Load:
    """Send requests to 127.0.0.1:port for `seconds`, in a cycle.

    rate : requests a second of all connections together; None: each connection as fast as it can
    keep : also return the bodies of responses with status 200
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe()
    child = context.Process(
        target=_run_child, args=(sender, port, list(requests), clients, seconds, rate, keep)
    )
    child.start()
    sender.close()
    result: Load | Exception = receiver.recv()
    child.join()
    if isinstance(result, Exception):
        raise result
    return result


def _run_child(pipe: Any, *arguments: Any) -> None:
    try:
        pipe.send(Driver(*arguments).drive())
    except Exception as error:
        pipe.send(error)


class _Connection:
    def __init__(self, port: int) -> None:
        self.buffer, self.started = b"", 0.0
        self.socket = socket.create_connection(("127.0.0.1", port), TIMEOUT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, request: bytes) -> None:
        self.buffer, self.started = b"", time.perf_counter()
        self.socket.sendall(request)

    def receive(self) -> tuple[int, bytes, bytes] | None:
        """Status, head in lower case and body; None until the response is complete. Raises OSError."""
        received = self.socket.recv(1 << 16)
        if not received:
            raise ConnectionError("closed by the endpoint")
        self.buffer += received
        head, separator, body = self.buffer.partition(b"\r\n\r\n")
        if not separator:
            return None
        lower = head.lower()
        position = lower.find(b"content-length:")
        is_last_chunk = b"chunked" not in lower or body.endswith(b"0\r\n\r\n")
        is_complete = (
            is_last_chunk if position < 0 else len(body) >= int(lower[position + 15 :].split(b"\r\n", 1)[0])
        )
        return (int(head[9:12]), lower, body) if is_complete else None


class Driver:
    """A load from this thread, with the arguments of `load`."""

    def __init__(
        self, port: int, requests: list[bytes], clients: int, seconds: float, rate: float | None, keep: bool
    ) -> None:
        self.port, self.requests, self.clients, self.seconds, self.rate, self.keep = (
            port,
            requests,
            clients,
            seconds,
            rate,
            keep,
        )
        self.selector = selectors.DefaultSelector()
        self.idle: list[_Connection] = []
        self.sent = 0
        self.latency: list[float] = []
        self.refused: list[float] = []
        self.result = Load(0.0, np.zeros(0), np.zeros(0))

    def drive(self) -> Load:
        """Send requests for `seconds`."""
        started = time.perf_counter()
        until = started + self.seconds
        for _ in range(self.clients):
            self._connect()
        while (now := time.perf_counter()) < until:
            due = (
                len(self.idle)
                if self.rate is None
                else min(int((now - started) * self.rate) - self.sent, len(self.idle))
            )
            for _ in range(due):
                self.idle.pop().send(self.requests[self.sent % len(self.requests)])
                self.sent += 1
            wait = 1.0 if self.rate is None else max(started + (self.sent + 1) / self.rate - now, 0.0)
            for key, _ in self.selector.select(min(until - now, wait)):
                self._receive(key.data)
        for key in list(self.selector.get_map().values()):
            key.data.socket.close()
        self.result.seconds = time.perf_counter() - started
        self.result.latency_s, self.result.refused_s = np.array(self.latency), np.array(self.refused)
        return self.result

    def _connect(self) -> None:
        connection = _Connection(self.port)
        self.selector.register(connection.socket, selectors.EVENT_READ, connection)
        self.idle.append(connection)

    def _reconnect(self, connection: _Connection) -> None:
        self.selector.unregister(connection.socket)
        connection.socket.close()
        self._connect()

    def _receive(self, connection: _Connection) -> None:
        if connection in self.idle:  # nothing was sent: a proxy closes what was idle for long
            self.idle.remove(connection)
            self._reconnect(connection)
            return
        try:
            response = connection.receive()
        except OSError:
            response = (0, b"connection: close", b"")
        if response is None:
            return
        status, head, body = response
        elapsed_s = time.perf_counter() - connection.started
        if status == 200:
            self.latency.append(elapsed_s)
            if self.keep:
                self.result.bodies.append(body)
        elif status == 503:
            self.refused.append(elapsed_s)
            self.result.retry_after += b"retry-after:" in head
        else:
            self.result.other_statuses[status] = self.result.other_statuses.get(status, 0) + 1
        if b"connection: close" in head:
            self._reconnect(connection)
        else:
            self.idle.append(connection)
