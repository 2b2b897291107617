"""A client of the endpoint, for programs that ask it: `Client`, and `AsyncClient` for asyncio.

    with Client("http://127.0.0.1:8000") as endpoint:
        endpoint.recommend(user_id=17850, k=5)["items"]

The operations and their types are made from the OpenAPI document (`recray.client.generate`).
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any

from recray.client.operations import AsyncOperations, Operations
from recray.errors import RecrayError, RequestError, UnavailableError, UnknownItemError

if TYPE_CHECKING:
    import aiohttp

__all__ = ["AsyncClient", "Client"]

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

        for left in range(self.repeats if repeatable else 0, -1, -1):
            try:
                response = self._session.request(
                    method, f"{self.address}{path}", json=_without_none(body), timeout=self.timeout_s
                )
                if response.status_code == 200:
                    return response.json()
                error = to_error(response.status_code, response.content, path)
                pause = response.headers.get("Retry-After")
            except requests.RequestException as broken:
                error, pause = _unavailable(self.address, broken), None
            if not left or not isinstance(error, UnavailableError):
                raise error
            time.sleep(float(pause or PAUSE_S))
        raise AssertionError


class AsyncClient(_Settings, AsyncOperations):
    """As `Client`, with methods that are awaited; use it as `async with`."""

    async def __aenter__(self) -> AsyncClient:
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=self.timeout_s)
        self._session: aiohttp.ClientSession = aiohttp.ClientSession(headers=self.headers, timeout=timeout)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def _call(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, repeatable: bool
    ) -> Any:
        import aiohttp

        for left in range(self.repeats if repeatable else 0, -1, -1):
            try:
                request = self._session.request(method, f"{self.address}{path}", json=_without_none(body))
                async with request as response:
                    content, pause = await response.read(), response.headers.get("Retry-After")
                    if response.status == 200:
                        return await response.json()
                    error = to_error(response.status, content, path)
            except (aiohttp.ClientError, TimeoutError) as broken:
                error, pause = _unavailable(self.address, broken), None
            if not left or not isinstance(error, UnavailableError):
                raise error
            await asyncio.sleep(float(pause or PAUSE_S))
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


def _without_none(body: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if body is None else {name: value for name, value in body.items() if value is not None}
