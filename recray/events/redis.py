"""The event store in Redis, for replicas on several machines: one stream, and a sorted set of recent events
per user. One script writes both.

Acknowledged entries are on disk only if Redis runs with `appendonly yes` and `appendfsync always`, which is
checked at opening.
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
from recray.events.items import ItemChange, merge_changes
from recray.events.log import MAX_RECENT, SCAN_ENTRIES, Entry, Kind, Log

PREFIX = "recray"
MIN_KEEP_S = 30 * 86_400  # how long a key, and a user's events after the newest one, are kept at least
TIMEOUT_S = 1.0

# KEYS: counter, stream, identity. ARGV: identity, prefix, seconds to keep, events per user at most; then for
# each entry: kind, key, user ("": none), JSON, digest of the body. A key written before 0.2 holds '1' instead
# of a digest.
_APPEND = """
if redis.call('GET', KEYS[3]) ~= ARGV[1] then
    return {}
end
local numbers = {}
for i = 5, #ARGV, 5 do
    local key = ARGV[2] .. ':key:' .. ARGV[i] .. ':' .. ARGV[i + 1]
    if redis.call('SET', key, ARGV[i + 4], 'NX', 'EX', ARGV[3]) then
        local number = redis.call('INCR', KEYS[1])
        redis.call('XADD', KEYS[2], number .. '-0', 'entry', ARGV[i + 3])
        if ARGV[i] == 'event' and ARGV[i + 2] ~= '' then
            local user = ARGV[2] .. ':user:' .. ARGV[i + 2]
            redis.call('ZADD', user, number, ARGV[i + 3])
            redis.call('ZREMRANGEBYRANK', user, 0, -1 - tonumber(ARGV[4]))
            redis.call('EXPIRE', user, ARGV[3])
        end
        numbers[#numbers + 1] = number
    else
        local digest = redis.call('GET', key)
        numbers[#numbers + 1] = (digest == ARGV[i + 4] or digest == '1') and 0 or -1
    end
end
return numbers
"""

ITEMS, ITEMS_ORDER, ITEMS_LAST = (f"{PREFIX}:items{name}" for name in ("", ":order", ":last"))
"""Changes of items by item, items by the number of their last change, and the last number."""


class RedisLog(Log):
    """`Log` in one Redis database, under keys that begin with `recray`; one database per workspace."""

    def __init__(self, url: str, keep_days: float = 0.0) -> None:
        self.url = url
        self._keep_s = round(max(MIN_KEEP_S, keep_days * 86_400))
        try:
            self._redis: Any = redis.Redis.from_url(
                url,
                socket_timeout=TIMEOUT_S,
                socket_connect_timeout=TIMEOUT_S,
                decode_responses=True,
                retry=Retry(NoBackoff(), 1),
            )
        except ValueError as error:
            raise StateError(
                f"serve.state={self._address}: {error}", "write redis://host:port/database"
            ) from None
        self._append = self._redis.register_script(_APPEND)
        self._call(self._check_durability)
        self._identity = self._load_identity()

    @property
    def identity(self) -> str:
        return self._identity

    def append(self, entries: Sequence[Entry]) -> list[int]:
        arguments: list[Any] = [PREFIX, self._keep_s, MAX_RECENT]
        for entry in entries:
            arguments += [entry.kind, entry.key, entry.user or "", entry.to_json(), entry.body_digest]
        keys = [f"{PREFIX}:last", f"{PREFIX}:log", f"{PREFIX}:identity"]
        numbers = self._call(lambda: self._append(keys=keys, args=[self._identity, *arguments]))
        if entries and not numbers:  # the database was emptied: a new store, which counts from 1
            self._identity = self._load_identity()
            numbers = self._call(lambda: self._append(keys=keys, args=[self._identity, *arguments]))
        return [int(number) for number in numbers]

    def recent(self, user: str, after: int, from_s: float, limit: int = MAX_RECENT) -> list[Entry]:
        scored_texts = self._call(
            lambda: self._redis.zrange(f"{PREFIX}:user:{user}", -limit, -1, withscores=True)
        )
        return _select_recent(scored_texts, after, from_s)

    def recent_of(
        self, users: Sequence[str], after: int, from_s: float, limit: int = MAX_RECENT
    ) -> dict[str, list[Entry]]:
        def read() -> list[list[tuple[str, float]]]:
            pipe = self._redis.pipeline(transaction=False)
            for user in users:
                pipe.zrange(f"{PREFIX}:user:{user}", -limit, -1, withscores=True)
            return list(pipe.execute())

        entries = {
            user: _select_recent(scored_texts, after, from_s)
            for user, scored_texts in zip(users, self._call(read), strict=True)
        }
        return {user: events for user, events in entries.items() if events}

    def has(self, kind: Kind, key: str) -> bool:
        return bool(self._call(lambda: self._redis.exists(f"{PREFIX}:key:{kind}:{key}")))

    def read(self, after: int, limit: int) -> list[tuple[int, Entry]]:
        stream_entries = self._call(
            lambda: self._redis.xrange(f"{PREFIX}:log", f"({after}-0" if after else "-", "+", count=limit)
        )
        return [
            (int(number.partition("-")[0]), Entry.from_json(fields["entry"]))
            for number, fields in stream_entries
        ]

    def last(self) -> int:
        return int(self._call(lambda: self._redis.get(f"{PREFIX}:last")) or 0)

    def drop_through(self, through: int) -> None:
        self._call(lambda: self._redis.xtrim(f"{PREFIX}:log", minid=f"{through + 1}-0", approximate=False))

    def forget_user(self, user: str) -> int:
        entries = list(self.read_user(user))
        for first in range(0, len(entries), SCAN_ENTRIES):
            self._drop(entries[first : first + SCAN_ENTRIES])
        self._call(lambda: self._redis.delete(f"{PREFIX}:user:{user}"))
        with contextlib.suppress(redis.ResponseError):  # a rewrite is running, or a hosted Redis forbids it
            self._redis.bgrewriteaof()
        return len(entries)

    def _drop(self, entries: list[tuple[int, Entry]]) -> None:
        self._call(lambda: self._redis.xdel(f"{PREFIX}:log", *(f"{number}-0" for number, _ in entries)))
        self._call(
            lambda: self._redis.delete(*(f"{PREFIX}:key:{entry.kind}:{entry.key}" for _, entry in entries))
        )

    def change_items(self, changes: Sequence[ItemChange]) -> None:
        self._call(lambda: self._redis.transaction(lambda pipe: _store_changes(pipe, changes), ITEMS_LAST))

    def read_items(self, after: int) -> tuple[int, list[ItemChange]]:
        last = int(self._call(lambda: self._redis.get(ITEMS_LAST)) or 0)
        if last <= after:
            return last, []
        scored_keys = self._call(
            lambda: self._redis.zrangebyscore(ITEMS_ORDER, f"({after}", "+inf", withscores=True)
        )
        texts = (
            self._call(lambda: self._redis.hmget(ITEMS, [key for key, _ in scored_keys]))
            if scored_keys
            else []
        )
        # a change that came in between is read again next time
        return last, [ItemChange.from_json(text) for text in texts if text is not None]

    def close(self) -> None:
        self._redis.close()

    def _load_identity(self) -> str:
        """The store's identity, created now if it has none."""
        self._call(lambda: self._redis.set(f"{PREFIX}:identity", uuid.uuid4().hex, nx=True))
        return str(self._call(lambda: self._redis.get(f"{PREFIX}:identity")))

    def _check_durability(self) -> None:
        """Raises StateError if Redis may lose acknowledged entries."""
        try:
            names = ("appendonly", "appendfsync", "maxmemory", "maxmemory-policy")
            options = {
                name: value for pattern in names for name, value in self._redis.config_get(pattern).items()
            }
        except redis.ResponseError:  # a hosted Redis may forbid CONFIG
            logging.getLogger("recray").warning(
                "%s does not allow CONFIG: whether it keeps acknowledged entries is unknown", self._address
            )
            return
        if options.get("appendonly") != "yes" or options.get("appendfsync") != "always":
            raise StateError(
                f"{self._address} acknowledges entries before they are on disk: appendonly "
                f"{options.get('appendonly')}, appendfsync {options.get('appendfsync')}",
                "start it with --appendonly yes --appendfsync always",
            )
        if options.get("maxmemory", "0") != "0" and options.get("maxmemory-policy") != "noeviction":
            problem = (
                f"{self._address} evicts entries when its memory is full: maxmemory-policy "
                f"{options.get('maxmemory-policy')}"
            )
            raise StateError(problem, "start it with --maxmemory-policy noeviction")

    @property
    def _address(self) -> str:
        """The address without the password."""
        scheme, _, rest = self.url.partition("://")
        return f"{scheme}://{rest.rpartition('@')[2]}"

    def _call(self, command: Callable[[], Any]) -> Any:
        try:
            return command()
        except redis.RedisError as error:
            raise StateError(f"{self._address}: {error}", "start it, or check serve.state") from error


def _store_changes(pipe: Any, changes: Sequence[ItemChange]) -> None:
    """Queue the commands of a transaction that watches `ITEMS_LAST`, which every change increments."""
    keys = [change.key for change in changes]
    texts = pipe.hmget(ITEMS, keys)
    stored = {
        key: ItemChange.from_json(text) for key, text in zip(keys, texts, strict=True) if text is not None
    }
    number = int(pipe.get(ITEMS_LAST) or 0) + 1
    merged = merge_changes(changes, stored)
    pipe.multi()
    pipe.set(ITEMS_LAST, number)
    pipe.hset(ITEMS, mapping={key: change.to_json() for key, change in merged.items()})
    pipe.zadd(ITEMS_ORDER, dict.fromkeys(merged, number))


def _select_recent(scored_texts: Sequence[tuple[str, float]], after: int, from_s: float) -> list[Entry]:
    entries = ((number, Entry.from_json(text)) for text, number in scored_texts)
    return [entry for number, entry in entries if number > after or entry.at_s >= from_s]
