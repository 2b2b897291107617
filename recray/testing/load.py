"""A load on an HTTP endpoint from one process of its own: so many connections, each with one request at a time.

Each connection asks again as soon as it was answered (closed loop), or all together at a rate, whatever the answers (open loop, as long
as a connection is free). Knows just enough HTTP/1.1 to be cheap beside the server that it measures.
"""

from __future__ import annotations

import json
import multiprocessing
import selectors
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

TIMEOUT_S = 30.0


@dataclass
class Load:
    """What a load saw. latency_s holds those of answers with status 200, refused_s those of 503; told: of these, with Retry-After."""

    seconds: float
    latency_s: np.ndarray
    refused_s: np.ndarray
    others: dict[int, int] = field(default_factory=dict)
    bodies: list[bytes] = field(default_factory=list)
    told: int = 0

    @property
    def per_s(self) -> float:
        """Answers with status 200 a second."""
        return len(self.latency_s) / self.seconds

    def ms(self, percent: float) -> float:
        """A percentile of the latency."""
        return float(np.percentile(self.latency_s, percent) * 1000) if len(self.latency_s) else float("nan")


def post(path: str, body: dict[str, Any]) -> bytes:
    """The bytes of a POST request."""
    content = json.dumps(body).encode()
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content


def load(port: int, requests: Sequence[bytes], clients: int, seconds: float, *, rate: float | None = None, keep: bool = False) -> Load:
    """Ask 127.0.0.1:port for so many seconds, with the requests one after the other and around again.

    rate : requests a second of all connections together; None: as soon as each was answered
    keep : also return the bodies of the answers with status 200
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_child, args=(theirs, port, list(requests), clients, seconds, rate, keep))
    child.start()
    theirs.close()
    found: Load | Exception = ours.recv()
    child.join()
    if isinstance(found, Exception):
        raise found
    return found


def _child(pipe: Any, *arguments: Any) -> None:
    try:
        pipe.send(Driver(*arguments).drive())
    except Exception as error:
        pipe.send(error)


class _Connection:
    def __init__(self, port: int) -> None:
        self.buffer, self.begun = b"", 0.0
        self.socket = socket.create_connection(("127.0.0.1", port), TIMEOUT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, request: bytes) -> None:
        self.buffer, self.begun = b"", time.perf_counter()
        self.socket.sendall(request)

    def receive(self) -> tuple[int, bytes, bytes] | None:
        """Status, head in lower case and body; None while more is to come. Raises OSError."""
        got = self.socket.recv(1 << 16)
        if not got:
            raise ConnectionError("closed by the endpoint")
        self.buffer += got
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return None
        lower = head.lower()
        place = lower.find(b"content-length:")
        ends = b"chunked" not in lower or body.endswith(b"0\r\n\r\n")
        whole = ends if place < 0 else len(body) >= int(lower[place + 15 :].split(b"\r\n", 1)[0])
        return (int(head[9:12]), lower, body) if whole else None


class Driver:
    """A load that this thread drives, with the arguments of `load`."""

    def __init__(self, port: int, requests: list[bytes], clients: int, seconds: float, rate: float | None, keep: bool) -> None:
        self.port, self.requests, self.clients, self.seconds, self.rate, self.keep = port, requests, clients, seconds, rate, keep
        self.selector = selectors.DefaultSelector()
        self.idle: list[_Connection] = []
        self.asked = 0
        self.latency: list[float] = []
        self.refused: list[float] = []
        self.found = Load(0.0, np.zeros(0), np.zeros(0))

    def drive(self) -> Load:
        """Ask for as long as was said."""
        begun = time.perf_counter()
        until = begun + self.seconds
        for _ in range(self.clients):
            self._connect()
        while (now := time.perf_counter()) < until:
            due = len(self.idle) if self.rate is None else min(int((now - begun) * self.rate) - self.asked, len(self.idle))
            for _ in range(due):
                self.idle.pop().send(self.requests[self.asked % len(self.requests)])
                self.asked += 1
            wait = 1.0 if self.rate is None else max(begun + (self.asked + 1) / self.rate - now, 0.0)
            for key, _ in self.selector.select(min(until - now, wait)):
                self._hear(key.data)
        for key in list(self.selector.get_map().values()):
            key.data.socket.close()
        self.found.seconds = time.perf_counter() - begun
        self.found.latency_s, self.found.refused_s = np.array(self.latency), np.array(self.refused)
        return self.found

    def _connect(self) -> None:
        connection = _Connection(self.port)
        self.selector.register(connection.socket, selectors.EVENT_READ, connection)
        self.idle.append(connection)

    def _hear(self, connection: _Connection) -> None:
        try:
            answer = connection.receive()
        except OSError:
            answer = (0, b"connection: close", b"")
        if answer is None:
            return
        status, head, body = answer
        took = time.perf_counter() - connection.begun
        if status == 200:
            self.latency.append(took)
            if self.keep:
                self.found.bodies.append(body)
        elif status == 503:
            self.refused.append(took)
            self.found.told += b"retry-after:" in head
        else:
            self.found.others[status] = self.found.others.get(status, 0) + 1
        if b"connection: close" in head:
            self.selector.unregister(connection.socket)
            connection.socket.close()
            self._connect()
        else:
            self.idle.append(connection)
