"""A closed-loop load on an HTTP endpoint: so many connections, each with one request at a time, from one process of its own.

Knows just enough HTTP/1.1 to be cheap beside the server that it measures: answers need a Content-Length.
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
    """What a load saw. latency_s holds those of answers with status 200, refused_s those of 503."""

    seconds: float
    latency_s: np.ndarray
    refused_s: np.ndarray
    others: dict[int, int] = field(default_factory=dict)
    bodies: list[bytes] = field(default_factory=list)

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
    return f"POST {path} HTTP/1.1\r\nHost: recray\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content


def load(port: int, requests: Sequence[bytes], clients: int, seconds: float, *, keep: bool = False) -> Load:
    """Ask 127.0.0.1:port for so many seconds; each connection sends the next of `requests` as soon as it was answered.

    keep : also return the bodies of the answers with status 200
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_child, args=(theirs, port, list(requests), clients, seconds, keep))
    child.start()
    theirs.close()
    found: Load | Exception = ours.recv()
    child.join()
    if isinstance(found, Exception):
        raise found
    return found


def _child(pipe: Any, port: int, requests: list[bytes], clients: int, seconds: float, keep: bool) -> None:
    try:
        pipe.send(_drive(port, requests, clients, seconds, keep))
    except Exception as error:
        pipe.send(error)


class _Connection:
    def __init__(self, port: int) -> None:
        self.port, self.buffer, self.begun = port, b"", 0.0
        self.socket = socket.create_connection(("127.0.0.1", port), TIMEOUT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, request: bytes) -> None:
        self.buffer, self.begun = b"", time.perf_counter()
        self.socket.sendall(request)

    def receive(self) -> tuple[int, bytes, bool] | None:
        """Status, body, and whether the connection stays; None while more is to come. Raises ConnectionError."""
        got = self.socket.recv(1 << 16)
        if not got:
            raise ConnectionError("closed by the endpoint")
        self.buffer += got
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return None
        lower = head.lower()
        place = lower.find(b"content-length:")
        length = int(lower[place + 15 :].split(b"\r\n", 1)[0]) if place >= 0 else 0
        if len(body) < length:
            return None
        return int(head[9:12]), body, b"connection: close" not in lower


def _drive(port: int, requests: list[bytes], clients: int, seconds: float, keep: bool) -> Load:
    latency: list[float] = []
    refused: list[float] = []
    others: dict[int, int] = {}
    bodies: list[bytes] = []
    selector = selectors.DefaultSelector()
    asked = 0

    def connect() -> None:
        nonlocal asked
        connection = _Connection(port)
        selector.register(connection.socket, selectors.EVENT_READ, connection)
        connection.send(requests[asked % len(requests)])
        asked += 1

    begun = time.perf_counter()
    until = begun + seconds
    for _ in range(clients):
        connect()
    while (now := time.perf_counter()) < until:
        for key, _ in selector.select(min(until - now, 1.0)):
            connection: _Connection = key.data
            try:
                answer = connection.receive()
            except OSError:
                answer = (0, b"", False)
            if answer is None:
                continue
            status, body, stays = answer
            took = time.perf_counter() - connection.begun
            if status == 200:
                latency.append(took)
                if keep:
                    bodies.append(body)
            elif status == 503:
                refused.append(took)
            else:
                others[status] = others.get(status, 0) + 1
            if stays:
                connection.send(requests[asked % len(requests)])
                asked += 1
            else:
                selector.unregister(connection.socket)
                connection.socket.close()
                connect()
    for key in list(selector.get_map().values()):
        key.data.socket.close()
    return Load(time.perf_counter() - begun, np.array(latency), np.array(refused), others, bodies)
