"""A client of the endpoint, for programs that ask it: `Client`, and `AsyncClient` for asyncio.

    with Client("http://127.0.0.1:8000") as endpoint:
        endpoint.recommend(user_id=17850, k=5)["items"]

The operations and their types are made from the OpenAPI document (`recray.client.generate`).
"""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import time
from typing import TYPE_CHECKING, Any

from recray.client.operations import AsyncOperations, Operations
from recray.errors import RecrayError, RequestError, UnavailableError, UnknownItemError

if TYPE_CHECKING:
    import aiohttp

__all__ = ["AsyncClient", "Client"]

JSON = {"Content-Type": "application/json"}
PAUSE_S = 1.0  # before a request is repeated, where the endpoint does not say how long


class _Settings:
    def __init__(
        self, address: str, key: str | None = None, *, timeout_s: float = 5.0, repeats: int = 2
    ) -> None:
        """
        address : of the endpoint, http://host:port
        key : API key; None: none
        timeout_s : limit of a request
        repeats : how often a request that wrote nothing is repeated while the endpoint is unavailable
        """
        if not address.startswith(("http://", "https://")):
            raise RequestError(f"{address} is no address", f"http://{address}")
        self.address, self.timeout_s, self.repeats = address.rstrip("/"), timeout_s, repeats
        self.headers = {} if key is None else {"Authorization": f"Bearer {key}"}


class Client(_Settings, Operations):
    """Sends requests over a connection that it keeps. Threads need one each.

    A method raises RequestError for a request that the endpoint refuses (UnknownItemError for an unknown
    item), and UnavailableError where it is unavailable.
    """

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._session.close()

    @property
    def _session(self) -> Any:
        import requests

        session = self.__dict__.get("_open_session")
        if session is None:
            session = self.__dict__["_open_session"] = requests.Session()
            session.headers.update(self.headers)
        return session

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None, *, repeatable: bool) -> Any:
        import requests

        content = _to_json(body, path)
        for left in range(self.repeats if repeatable else 0, -1, -1):
            try:
                response = self._session.request(
                    method, f"{self.address}{path}", data=content, headers=JSON, timeout=self.timeout_s
                )
                if response.status_code == 200:
                    return response.json()
                error = to_error(response.status_code, response.content, path)
                pause = response.headers.get("Retry-After")
            except (requests.RequestException, ValueError) as broken:
                error, pause = _unavailable(self.address, broken), None
            if not left or not isinstance(error, UnavailableError):
                raise error
            time.sleep(_to_pause(pause, self.timeout_s))
        raise AssertionError


class AsyncClient(_Settings, AsyncOperations):
    """As `Client`, with methods that are awaited; use it as `async with`."""

    _session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> AsyncClient:
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=self.timeout_s)
        self._session = aiohttp.ClientSession(headers=self.headers, timeout=timeout)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def _call(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, repeatable: bool
    ) -> Any:
        import aiohttp

        if self._session is None:
            raise RequestError("the client is not open", "async with AsyncClient(…) as client")
        sent = _to_json(body, path)
        for left in range(self.repeats if repeatable else 0, -1, -1):
            try:
                request = self._session.request(method, f"{self.address}{path}", data=sent, headers=JSON)
                async with request as response:
                    content, pause = await response.read(), response.headers.get("Retry-After")
                    if response.status == 200:
                        return await response.json()
                    error = to_error(response.status, content, path)
            except (aiohttp.ClientError, TimeoutError, ValueError) as broken:
                error, pause = _unavailable(self.address, broken), None
            if not left or not isinstance(error, UnavailableError):
                raise error
            await asyncio.sleep(_to_pause(pause, self.timeout_s))
        raise AssertionError


def to_error(status: int, content: bytes, path: str) -> RecrayError:
    """The error of a problem document."""
    try:
        problem = json.loads(content)
        message, fix = str(problem["detail"]), str(problem.get("fix", ""))
    except (ValueError, KeyError, TypeError):
        message, fix = f"{path} responded with status {status}", ""
    if status in (429, 503) or status >= 500:
        return UnavailableError(message, fix or "retry later")
    is_unknown_item = status == 404 and "item" in message
    return UnknownItemError(message, fix) if is_unknown_item else RequestError(message, fix)


def _unavailable(address: str, error: Exception) -> UnavailableError:
    return UnavailableError(
        f"{address} does not respond: {type(error).__name__}", "check the address; retry later"
    )


def _to_json(body: dict[str, Any] | None, path: str) -> bytes | None:
    """A body without its None; numbers of numpy and times are written too. Raises RequestError."""

    def convert(value: Any) -> Any:
        if isinstance(value, dt.datetime | dt.date):
            return value.isoformat()
        if hasattr(value, "tolist"):  # numpy's and torch's
            return value.tolist()
        raise TypeError(f"{type(value).__name__} is not JSON")

    if body is None:
        return None
    sent = {name: value for name, value in body.items() if value is not None}
    try:
        return json.dumps(sent, default=convert, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise RequestError(f"{path}: {error}", "send text, numbers, lists and dicts") from None


def _to_pause(text: str | None, limit_s: float) -> float:
    """Seconds of a Retry-After header, at most the limit of a request."""
    try:
        return min(max(float(text or PAUSE_S), 0.0), limit_s)
    except ValueError:  # a date
        return PAUSE_S
