"""The log in Redis, for replicas on several machines: one stream, a sorted set of recent events a user, one script that writes both.

Acknowledged means on disk only where Redis runs with `appendonly yes` and `appendfsync always`, which is asked for when it is opened.
"""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from recray.errors import StateError
from recray.state.log import RECENT, SCANNED, Entry, Kind, Log

PREFIX = "recray"
KEPT_S = 30 * 86_400  # how long a key is known at least, and a user's last events after the newest of them
TIMEOUT_S = 1.0

# KEYS: counter, stream, identity. ARGV: identity, prefix, seconds kept, most events a user, then of each entry kind, key, user ("": none), JSON,
# digest of the body; a key of before 0.2 holds '1' for any
_APPEND = """
if redis.call('GET', KEYS[3]) ~= ARGV[1] then
    return {}
end
local found = {}
for i = 5, #ARGV, 5 do
    local known = ARGV[2] .. ':key:' .. ARGV[i] .. ':' .. ARGV[i + 1]
    if redis.call('SET', known, ARGV[i + 4], 'NX', 'EX', ARGV[3]) then
        local number = redis.call('INCR', KEYS[1])
        redis.call('XADD', KEYS[2], number .. '-0', 'entry', ARGV[i + 3])
        if ARGV[i] == 'event' and ARGV[i + 2] ~= '' then
            local user = ARGV[2] .. ':user:' .. ARGV[i + 2]
            redis.call('ZADD', user, number, ARGV[i + 3])
            redis.call('ZREMRANGEBYRANK', user, 0, -1 - tonumber(ARGV[4]))
            redis.call('EXPIRE', user, ARGV[3])
        end
        found[#found + 1] = number
    else
        local said = redis.call('GET', known)
        found[#found + 1] = (said == ARGV[i + 4] or said == '1') and 0 or -1
    end
end
return found
"""


class RedisLog(Log):
    """`Log` in one Redis database, under keys that begin with `recray`; one database a storage root."""

    def __init__(self, url: str, keep_days: float = 0.0) -> None:
        self.url = url
        self._keep_s = round(max(KEPT_S, keep_days * 86_400))
        try:
            self._redis: Any = redis.Redis.from_url(
                url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S, decode_responses=True, retry=Retry(NoBackoff(), 1)
            )
        except ValueError as error:
            raise StateError(f"serve.state={self._shown}: {error}", "write redis://host:port/database") from None
        self._append = self._redis.register_script(_APPEND)
        self._call(self._keeps)
        self._identity = self._name()

    @property
    def identity(self) -> str:
        return self._identity

    def append(self, entries: Sequence[Entry]) -> list[int]:
        arguments: list[Any] = [PREFIX, self._keep_s, RECENT]
        for entry in entries:
            arguments += [entry.kind, entry.key, entry.user or "", entry.to_json(), entry.said]
        keys = [f"{PREFIX}:last", f"{PREFIX}:log", f"{PREFIX}:identity"]
        found = self._call(lambda: self._append(keys=keys, args=[self._identity, *arguments]))
        if entries and not found:  # it was emptied since: a new store, which counts anew
            self._identity = self._name()
            found = self._call(lambda: self._append(keys=keys, args=[self._identity, *arguments]))
        return [int(number) for number in found]

    def recent(self, user: str, after: int, from_s: float, limit: int = RECENT) -> list[Entry]:
        found = self._call(lambda: self._redis.zrange(f"{PREFIX}:user:{user}", -limit, -1, withscores=True))
        entries = ((number, Entry.from_json(text)) for text, number in found)
        return [entry for number, entry in entries if number > after or entry.at_s >= from_s]

    def has(self, kind: Kind, key: str) -> bool:
        return bool(self._call(lambda: self._redis.exists(f"{PREFIX}:key:{kind}:{key}")))

    def read(self, after: int, limit: int) -> list[tuple[int, Entry]]:
        found = self._call(lambda: self._redis.xrange(f"{PREFIX}:log", f"({after}-0" if after else "-", "+", count=limit))
        return [(int(number.partition("-")[0]), Entry.from_json(fields["entry"])) for number, fields in found]

    def last(self) -> int:
        return int(self._call(lambda: self._redis.get(f"{PREFIX}:last")) or 0)

    def forget(self, through: int) -> None:
        self._call(lambda: self._redis.xtrim(f"{PREFIX}:log", minid=f"{through + 1}-0", approximate=False))

    def forget_user(self, user: str) -> int:
        entries = list(self.of_user(user))
        for first in range(0, len(entries), SCANNED):
            self._drop(entries[first : first + SCANNED])
        self._call(lambda: self._redis.delete(f"{PREFIX}:user:{user}"))
        with contextlib.suppress(redis.ResponseError):  # one is running, or a hosted one does not let us; the next one takes them too
            self._redis.bgrewriteaof()
        return len(entries)

    def _drop(self, some: list[tuple[int, Entry]]) -> None:
        self._call(lambda: self._redis.xdel(f"{PREFIX}:log", *(f"{place}-0" for place, _ in some)))
        self._call(lambda: self._redis.delete(*(f"{PREFIX}:key:{entry.kind}:{entry.key}" for _, entry in some)))

    def close(self) -> None:
        self._redis.close()

    def _name(self) -> str:
        """The store's identity, given now if it has none."""
        self._call(lambda: self._redis.set(f"{PREFIX}:identity", uuid.uuid4().hex, nx=True))
        return str(self._call(lambda: self._redis.get(f"{PREFIX}:identity")))

    def _keeps(self) -> None:
        """Raises StateError if Redis is known to acknowledge what it has not on disk."""
        try:
            names = ("appendonly", "appendfsync", "maxmemory", "maxmemory-policy")
            found = {name: value for asked in names for name, value in self._redis.config_get(asked).items()}
        except redis.ResponseError:  # a hosted one that does not let itself be asked
            logging.getLogger("recray").warning("%s does not say whether it keeps what it acknowledges (CONFIG is not allowed)", self._shown)
            return
        if found.get("appendonly") != "yes" or found.get("appendfsync") != "always":
            raise StateError(
                f"{self._shown} acknowledges what it has not on disk: appendonly {found.get('appendonly')}, appendfsync {found.get('appendfsync')}",
                "start it with --appendonly yes --appendfsync always",
            )
        if found.get("maxmemory", "0") != "0" and found.get("maxmemory-policy") != "noeviction":
            what = f"{self._shown} throws away what it has no room for: maxmemory-policy {found.get('maxmemory-policy')}"
            raise StateError(what, "start it with --maxmemory-policy noeviction")

    @property
    def _shown(self) -> str:
        """The address without a password."""
        scheme, _, rest = self.url.partition("://")
        return f"{scheme}://{rest.rpartition('@')[2]}"

    def _call(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except redis.RedisError as error:
            raise StateError(f"{self._shown}: {error}", "start it, or check serve.state") from error
