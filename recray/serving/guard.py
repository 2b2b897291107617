"""API keys with scopes, and rate limits.

A keys file is a YAML list of entries: `name`, `sha256` (of the key), `scopes` (read, history, write, items,
admin) and optionally `rate`. The keys themselves are not stored: `recray serve key NAME` draws a key, shows
it once, and prints its entry.
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

from recray.config import ServeSettings, expand_path
from recray.errors import SettingsError
from recray.serving.problems import make_problem

KeyScope = Literal["read", "history", "write", "items", "admin"]
KEYS_VARIABLE = "RECRAY_KEYS"
REQUIRED_SCOPES: dict[str, KeyScope] = {
    "/v1/recommend": "read",
    "/v1/lists/{user_id}": "read",
    "/v1/score": "read",
    "/v1/similar": "read",
    "/v1/search": "read",
    "/v1/history": "history",
    "/v1/users": "history",
    "/v1/models": "read",
    "/v1/events": "write",
    "/v1/feedback": "write",
    "/v1/impressions": "write",
    "/v1/items": "items",
    "/v1/items/{item_id}": "items",
    "/v1/users/{user_id}": "admin",
}
PUBLIC_PATHS = ("/", "/healthz", "/readyz", "/docs", "/openapi.json", "/console")
PROBES = ("/healthz", "/readyz")
WAIT_S, RETRY_S = 0.2, 1.0  # timeout of the store of the rates; pause after a failure of it
RELOAD_S = 5.0  # between two checks of the keys file
KEY_NAME: ContextVar[str] = ContextVar("key_name", default="")
"""Name of the request's API key, empty where no key is required."""


class Key(BaseModel):
    """An entry of a keys file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    scopes: frozenset[KeyScope] = Field(min_length=1)
    rate: str | None = None

    @field_validator("rate")
    @classmethod
    def _check_rate(cls, rate: str | None) -> str | None:
        if rate is not None:
            parse_many(rate)
        return rate


class Keys:
    """The keys of a file, or of the text in RECRAY_KEYS. A changed file is reloaded.

    The constructor raises SettingsError. If the file cannot be read later, the current keys stay.
    """

    def __init__(self, path: str | None) -> None:
        self._path = None if path is None else expand_path(path, "serve.keys")
        self._text = "" if self._path is not None else os.environ.get(KEYS_VARIABLE, "")
        self._checked_s, self._modified_ns = time.monotonic(), self._read_modified()
        self._keys = self._read_keys()

    @property
    def are_required(self) -> bool:
        """Whether requests need a key."""
        return self._path is not None or bool(self._text)

    def find(self, secret: str) -> Key | None:
        """The entry of a key, None for an unknown key."""
        if self._path is not None and time.monotonic() > self._checked_s + RELOAD_S:
            self._reload()
        return self._keys.get(hashlib.sha256(secret.encode()).hexdigest())

    def _reload(self) -> None:
        self._checked_s, modified_ns = time.monotonic(), self._read_modified()
        if modified_ns == self._modified_ns:
            return
        self._modified_ns = modified_ns
        try:
            self._keys = self._read_keys()
        except SettingsError as error:
            logging.getLogger("ray.serve").error(
                "the API keys cannot be reloaded, the current ones stay: %s", error
            )

    def _read_modified(self) -> int:
        return self._path.stat().st_mtime_ns if self._path is not None and self._path.exists() else 0

    def _read_keys(self) -> dict[str, Key]:
        source = f"serve.keys {self._path}" if self._path is not None else KEYS_VARIABLE
        if not self.are_required:
            return {}
        try:
            content = yaml.safe_load(self._text if self._path is None else self._path.read_text())
            keys = TypeAdapter(list[Key]).validate_python(content)
        except OSError as error:
            raise SettingsError(
                f"{source} cannot be read: {error.strerror}", "name a file that the endpoint can read"
            ) from None
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(str(part) for part in details['loc'])}: {details['msg']}"
                for details in error.errors(include_input=False)[:3]
            )
            raise SettingsError(f"{source}: {problems}", "recray serve key NAME prints an entry") from None
        except (yaml.YAMLError, UnicodeDecodeError):
            raise SettingsError(f"{source} is not YAML", "recray serve key NAME prints an entry") from None
        return {key.sha256: key for key in keys}


def draw_key(name: str, scopes: list[str]) -> tuple[str, str]:
    """A new key, and its entry for a keys file. Raises SettingsError for an unknown scope."""
    secret = f"rk_{secrets.token_urlsafe(32)}"
    try:
        key = Key(name=name, sha256=hashlib.sha256(secret.encode()).hexdigest(), scopes=frozenset(scopes))
    except ValidationError:
        raise SettingsError(
            f"scopes {','.join(scopes)}", "choose among read, history, write, items and admin"
        ) from None
    return secret, yaml.safe_dump(
        [{"name": key.name, "sha256": key.sha256, "scopes": sorted(key.scopes)}], sort_keys=False
    )


def load_keys(options: ServeSettings) -> Keys:
    """The API keys of the settings. Raises SettingsError for an invalid keys file or rate."""
    if options.rate is not None:
        try:
            parse_many(options.rate)
        except ValueError:
            raise SettingsError(
                f"serve.rate: {options.rate!r} is not a rate",
                "write for example 100/second, or 100/second;1000/minute",
            ) from None
    return Keys(options.keys)


class Guard:
    """ASGI middleware: 401 without a valid key, 403 without the scope, 429 with Retry-After above the rate.

    Without API keys, every request is allowed, and the rate limit applies to all together. A request must
    then name this endpoint as its host (421): otherwise a web page could read responses through its
    visitor's browser (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, options: ServeSettings) -> None:
        self.app = app
        self.keys = load_keys(options)
        self._hosts = {
            "localhost",
            "",
            options.host.lower(),
            socket.gethostname().lower(),
            *(host.lower() for host in options.hosts),
        }
        self._rate = options.rate
        is_shared = options.state.startswith("redis")
        storage = (
            storage_from_string(f"async+{options.state}", implementation="redispy")
            if is_shared
            else MemoryStorage()
        )
        self._limiter = SlidingWindowCounterRateLimiter(storage)
        self._rates: dict[str, list[RateLimitItem]] = {}
        self._retry_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        if (
            not self.keys.are_required
            and path not in PROBES
            and not self._is_own_host(host := _read_host(scope))
        ):
            fix = "add it to serve.hosts, or require keys: serve.keys"
            refusal = make_problem(421, f"Host: {host} is not a name of this endpoint", fix)
            await refusal(scope, receive, send)
            return
        if path in PUBLIC_PATHS or path.startswith("/docs/"):
            await self.app(scope, receive, send)
            return
        name, rate = "everybody", self._rate
        if self.keys.are_required:
            key = self.keys.find(_read_secret(scope))
            if key is None:
                refusal = make_problem(
                    401,
                    "no valid API key",
                    "send it as Authorization: Bearer KEY",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await refusal(scope, receive, send)
                return
            required = _find_scope(scope["path"])
            if required not in key.scopes and "admin" not in key.scopes:
                refusal = make_problem(
                    403, f"this key lacks the scope {required}", "use a key with the scope"
                )
                await refusal(scope, receive, send)
                return
            name, rate = key.name, key.rate or rate
            KEY_NAME.set(name)
        if rate is not None and (wait_s := await self._count_request(name, rate)) is not None:
            headers = {"Retry-After": str(wait_s)}
            await make_problem(429, f"more than {rate}", "retry later", headers=headers)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _is_own_host(self, host: str) -> bool:
        """Whether a host name is this endpoint's, or an address, so that DNS rebinding is impossible."""
        if host in self._hosts or "*" in self._hosts or host.endswith(".localhost"):
            return True
        with contextlib.suppress(ValueError):
            ipaddress.ip_address(host)
            return True
        return False

    async def _count_request(self, name: str, rate: str) -> int | None:
        """Count a request of a key: None if it is allowed, else the seconds until the next one is."""
        if time.monotonic() < self._retry_at:
            return None
        limits = self._rates.setdefault(rate, parse_many(rate))
        try:
            for limit in limits:
                if not await asyncio.wait_for(self._limiter.hit(limit, "recray", name), WAIT_S):
                    reset = (await self._limiter.get_window_stats(limit, "recray", name)).reset_time
                    return max(1, math.ceil(reset - time.time()))
        except Exception as error:  # the endpoint must not depend on a shared store
            self._retry_at = time.monotonic() + RETRY_S
            logging.getLogger("ray.serve").error(
                "rate limits are not applied, their store is unavailable: %s", type(error).__name__
            )
        return None


def _find_scope(path: str) -> KeyScope:
    """The scope that a path needs."""
    for prefix in ("/v1/items/", "/v1/lists/"):
        if path.startswith(prefix):
            return REQUIRED_SCOPES[next(known for known in REQUIRED_SCOPES if known.startswith(prefix))]
    return REQUIRED_SCOPES.get(path, "admin")


def _read_host(scope: Scope) -> str:
    """The host name of a request, without its port; empty for none."""
    for name, value in scope["headers"]:
        if name == b"host":
            text = str(value.decode("latin-1").strip().lower())
            return (
                text[1:].partition("]")[0]
                if text.startswith("[")
                else text.rpartition(":")[0]
                if text.rpartition(":")[2].isdigit()
                else text
            )
    return ""


def _read_secret(scope: Scope) -> str:
    """The API key of a request, empty for none."""
    for name, value in scope["headers"]:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            return str(value[7:].decode("latin-1").strip())
        if name == b"x-api-key":
            return str(value.decode("latin-1").strip())
    return ""
