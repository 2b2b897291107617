"""Who may ask, and how often: API keys with scopes, and a rate for each key.

A keys file is YAML: a list of `name`, `sha256` (of the key), `scopes` (read, write, admin) and, if wanted, a `rate` of its own. The keys
themselves are nowhere: `recray serve key NAME` draws one, shows it once, and prints the entry.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ipaddress
import logging
import math
import os
import secrets
import socket
import time
from contextvars import ContextVar
from typing import Literal

import yaml
from limits import RateLimitItem, parse_many
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from limits.storage import storage_from_string
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator
from starlette.types import ASGIApp, Receive, Scope, Send

from recray.config import ServeSettings, expanded
from recray.errors import SettingsError
from recray.serving.problems import problem

Right = Literal["read", "history", "write", "admin"]
KEYS_VARIABLE = "RECRAY_KEYS"
RIGHTS: dict[str, Right] = {
    "/v1/recommend": "read",
    "/v1/score": "read",
    "/v1/similar": "read",
    "/v1/history": "history",
    "/v1/models": "read",
    "/v1/events": "write",
    "/v1/feedback": "write",
    "/v1/users/{user_id}": "admin",
}
OPEN = ("/healthz", "/readyz", "/docs", "/openapi.json", "/console")
PROBES = ("/healthz", "/readyz")
WAIT_S, AWAY_S = 0.2, 1.0  # for the store of the rates; how long it is not asked again
KEPT_S = 5.0  # how often the keys file is looked at
ASKED_BY: ContextVar[str] = ContextVar("asked_by", default="")
"""Name of the key that the request came with, empty where none is asked for."""


class Key(BaseModel):
    """One entry of a keys file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    scopes: frozenset[Right] = Field(min_length=1)
    rate: str | None = None

    @field_validator("rate")
    @classmethod
    def _is_a_rate(cls, rate: str | None) -> str | None:
        if rate is not None:
            parse_many(rate)
        return rate


class Keys:
    """The keys of a file, or of the text in RECRAY_KEYS; read again when the file changed.

    Raises SettingsError when it is made; later a file that cannot be read leaves the keys as they were.
    """

    def __init__(self, path: str | None) -> None:
        self._path = None if path is None else expanded(path, "serve.keys")
        self._text = "" if self._path is not None else os.environ.get(KEYS_VARIABLE, "")
        self._looked, self._stamp = time.monotonic(), self._changed()
        self._keys = self._read()

    @property
    def wanted(self) -> bool:
        """Whether a key is asked for."""
        return self._path is not None or bool(self._text)

    def find(self, secret: str) -> Key | None:
        """The entry of a key, None for one that is not known."""
        if self._path is not None and time.monotonic() > self._looked + KEPT_S:
            self._look()
        return self._keys.get(hashlib.sha256(secret.encode()).hexdigest())

    def _look(self) -> None:
        self._looked, stamp = time.monotonic(), self._changed()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = self._read()
        except SettingsError as error:
            logging.getLogger("ray.serve").error("the keys stay as they were: %s", error)

    def _changed(self) -> int:
        return self._path.stat().st_mtime_ns if self._path is not None and self._path.exists() else 0

    def _read(self) -> dict[str, Key]:
        where = f"serve.keys {self._path}" if self._path is not None else KEYS_VARIABLE
        if not self.wanted:
            return {}
        try:
            content = yaml.safe_load(self._text if self._path is None else self._path.read_text())
            found = TypeAdapter(list[Key]).validate_python(content)
        except OSError as error:
            raise SettingsError(f"{where} cannot be read: {error.strerror}", "name a file that the endpoint may read") from None
        except ValidationError as error:
            told = "; ".join(f"{'.'.join(str(part) for part in one['loc'])}: {one['msg']}" for one in error.errors(include_input=False)[:3])
            raise SettingsError(f"{where}: {told}", "recray serve key NAME prints an entry") from None
        except (yaml.YAMLError, UnicodeDecodeError):
            raise SettingsError(f"{where} is not YAML", "recray serve key NAME prints an entry") from None
        return {key.sha256: key for key in found}


def new_key(name: str, scopes: list[str]) -> tuple[str, str]:
    """A key, and its entry for a keys file. Raises SettingsError for a scope that is none."""
    secret = f"rk_{secrets.token_urlsafe(32)}"
    try:
        key = Key(name=name, sha256=hashlib.sha256(secret.encode()).hexdigest(), scopes=frozenset(scopes))
    except ValidationError:
        raise SettingsError(f"scopes {','.join(scopes)}", "choose among read, history, write and admin") from None
    return secret, yaml.safe_dump([{"name": key.name, "sha256": key.sha256, "scopes": sorted(key.scopes)}], sort_keys=False)


def check(options: ServeSettings) -> Keys:
    """The keys. Raises SettingsError for a keys file or a rate that cannot be used."""
    if options.rate is not None:
        try:
            parse_many(options.rate)
        except ValueError:
            raise SettingsError(f"serve.rate: {options.rate!r} is no rate", "write for example 100/second, or 100/second;1000/minute") from None
    return Keys(options.keys)


class Guard:
    """ASGI middleware: 401 without a known key, 403 without the right, 429 with Retry-After above the rate.

    Where no keys are named everybody may do everything, and the rate is that of all together. Then a request must be sent to a name of this
    endpoint (421), or a page of another site could read what is served to its visitor's own machine.
    """

    def __init__(self, app: ASGIApp, options: ServeSettings) -> None:
        self.app = app
        self.keys = check(options)
        self._hosts = {"localhost", "", options.host.lower(), socket.gethostname().lower(), *(host.lower() for host in options.hosts)}
        self._rate = options.rate
        shared = options.state.startswith("redis")
        storage = storage_from_string(f"async+{options.state}", implementation="redispy") if shared else MemoryStorage()
        self._limiter = SlidingWindowCounterRateLimiter(storage)
        self._rates: dict[str, list[RateLimitItem]] = {}
        self._again = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        if not self.keys.wanted and path not in PROBES and not self._is_ours(host := _host(scope)):
            fix = "name it in serve.hosts, or ask for keys: serve.keys"
            await problem(421, f"Host: {host} is no name of this endpoint", fix)(scope, receive, send)
            return
        if path in OPEN or path.startswith("/docs/"):
            await self.app(scope, receive, send)
            return
        name, rate = "everybody", self._rate
        if self.keys.wanted:
            key = self.keys.find(_secret(scope))
            if key is None:
                refusal = problem(401, "no known API key", "send it as Authorization: Bearer KEY", headers={"WWW-Authenticate": "Bearer"})
                await refusal(scope, receive, send)
                return
            right = RIGHTS.get(scope["path"], "admin")
            if right not in key.scopes and "admin" not in key.scopes:
                await problem(403, f"this key has no scope {right}", "use one that has")(scope, receive, send)
                return
            name, rate = key.name, key.rate or rate
            ASKED_BY.set(name)
        if rate is not None and (wait := await self._wait(name, rate)) is not None:
            await problem(429, f"more than {rate}", "come again later", headers={"Retry-After": str(wait)})(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _is_ours(self, host: str) -> bool:
        """Whether a name is one that this endpoint has: no page of another site can ask under it (DNS rebinding). An address is none."""
        if host in self._hosts or "*" in self._hosts or host.endswith(".localhost"):
            return True
        with contextlib.suppress(ValueError):
            ipaddress.ip_address(host)
            return True
        return False

    async def _wait(self, name: str, rate: str) -> int | None:
        """Seconds until the next request of a key may come; None if this one may."""
        if time.monotonic() < self._again:
            return None
        limits = self._rates.setdefault(rate, parse_many(rate))
        try:
            for limit in limits:
                if not await asyncio.wait_for(self._limiter.hit(limit, "recray", name), WAIT_S):
                    reset = (await self._limiter.get_window_stats(limit, "recray", name)).reset_time
                    return max(1, math.ceil(reset - time.time()))
        except Exception as error:  # a shared store that is away or hangs must not take the endpoint with it
            self._again = time.monotonic() + AWAY_S
            logging.getLogger("ray.serve").error("rates are not held, their store is away: %s", type(error).__name__)
        return None


def _host(scope: Scope) -> str:
    """The name that a request was sent to, without its port; empty for none."""
    for name, value in scope["headers"]:
        if name == b"host":
            text = str(value.decode("latin-1").strip().lower())
            return text[1:].partition("]")[0] if text.startswith("[") else text.rpartition(":")[0] if text.rpartition(":")[2].isdigit() else text
    return ""


def _secret(scope: Scope) -> str:
    """The key that a request carries, empty for none."""
    for name, value in scope["headers"]:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            return str(value[7:].decode("latin-1").strip())
        if name == b"x-api-key":
            return str(value.decode("latin-1").strip())
    return ""
