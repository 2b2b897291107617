"""Synthetic data: event logs of any size from a seed, for tests and for scale.

Users have tastes that drift; items have a vector, a category, a brand, a price and a popularity; what a user meets
follows taste, popularity and friends, and some of it is noise. The same seed and size always give the same rows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

START_S = 1_704_067_200  # 2024-01-01 UTC
_CHUNK_USERS = 20_000


@dataclass(frozen=True)
class SyntheticShop:
    """Specification of a world.

    Parameters
    ----------
    users, items : how many
    events_per_user : mean of a geometric number of events, at least 3
    days : length of the log
    taste_dim : dimensions of taste
    drift : how far a taste wanders over the log, 0 to 1
    noise : share of events that follow nothing
    repeat : share of events that repeat an earlier item of the user
    friends : friends of each user
    seed : draws everything
    """

    users: int
    items: int
    events_per_user: float = 20.0
    days: int = 120
    taste_dim: int = 8
    drift: float = 0.3
    noise: float = 0.1
    repeat: float = 0.15
    friends: int = 3
    seed: int = 0

    def write(self, folder: Path) -> None:
        """Write `events/part-*.parquet`, `items.parquet` and `social.parquet` below `folder`."""
        (folder / "events").mkdir(parents=True, exist_ok=True)
        pq.write_table(self.item_table(), folder / "items.parquet")
        pq.write_table(self.social_table(), folder / "social.parquet")
        for number, table in enumerate(self.event_tables()):
            pq.write_table(table, folder / "events" / f"part-{number:05d}.parquet", row_group_size=250_000)

    def item_table(self) -> pa.Table:
        """item_id string, title, category, brand, price, tags."""
        random = np.random.default_rng([self.seed, 1])
        category = self._categories()
        brand = random.integers(0, 20, self.items)
        return pa.table(
            {
                "item_id": [f"i{number:07d}" for number in range(self.items)],
                "title": [f"Item {number} of kind {kind}" for number, kind in enumerate(category)],
                "category": [f"kind {kind}" for kind in category],
                "brand": [f"brand {number}" for number in brand],
                "price": np.round(np.exp(random.normal(2.0, 1.0, self.items)), 2),
                "tags": [[f"kind {kind}", f"brand {number}"] for kind, number in zip(category, brand, strict=True)],
            }
        )

    def social_table(self) -> pa.Table:
        """user_id, friend_id: friends have neighbouring numbers, and neighbours share a base taste."""
        user = np.repeat(np.arange(self.users), self.friends)
        friend = (user + np.tile(np.arange(1, self.friends + 1), self.users)) % self.users
        return pa.table({"user_id": user, "friend_id": friend})

    def event_tables(self) -> Iterator[pa.Table]:
        """user_id int64, item_id string, timestamp (us, UTC), event (view, cart, purchase), value; a chunk of users at a time."""
        for chunk, first in enumerate(range(0, self.users, _CHUNK_USERS)):
            yield self._events(chunk, np.arange(first, min(first + _CHUNK_USERS, self.users)))

    def _categories(self) -> np.ndarray:
        return np.random.default_rng([self.seed, 2]).integers(0, 4 * self.taste_dim, self.items)

    def _events(self, chunk: int, users: np.ndarray) -> pa.Table:
        random = np.random.default_rng([self.seed, 3, chunk])
        count = 3 + random.geometric(1.0 / max(self.events_per_user - 3.0, 1.0), len(users)) - 1
        row = np.repeat(np.arange(len(users)), count)
        when = random.random(len(row))
        order = np.lexsort((when, row))
        when = when[order]
        item = self._choose(random, users, row, when)
        earlier = np.arange(len(row)) - (random.random(len(row)) * (np.arange(len(row)) - (np.cumsum(count) - count)[row])).astype(int)
        again = random.random(len(row)) < self.repeat
        item[again] = item[np.minimum(earlier, np.arange(len(row)))[again]]
        seconds = START_S + (when * self.days * 86_400).astype(np.int64)
        event = np.array(["view", "cart", "purchase"])[np.searchsorted([0.7, 0.85], random.random(len(row)))]
        return pa.table(
            {
                "user_id": users[row],
                "item_id": pa.array([f"i{number:07d}" for number in range(self.items)]).take(pa.array(item)),
                "timestamp": pa.array(seconds * 1_000_000, pa.timestamp("us", tz="UTC")),
                "event": pa.array(event).dictionary_encode(),
                "value": random.integers(1, 6, len(row)).astype(np.float32),
            }
        )

    def _choose(self, random: np.random.Generator, users: np.ndarray, row: np.ndarray, when: np.ndarray) -> np.ndarray:
        """An item for each event: a category by taste at that time, then an item of it by popularity."""
        kinds = 4 * self.taste_dim
        vectors = np.random.default_rng([self.seed, 4]).normal(size=(kinds, self.taste_dim))
        # users of one circle of friends share a base taste, so that a friend's events tell something
        circle = np.random.default_rng([self.seed, 5]).normal(size=(self.users // (self.friends + 1) + 1, self.taste_dim))
        base = circle[users // (self.friends + 1)] + 0.5 * random.normal(size=(len(users), self.taste_dim))
        goal = random.normal(size=(len(users), self.taste_dim))
        category = self._categories()
        by_kind = np.argsort(category, kind="stable")
        start = np.searchsorted(category[by_kind], np.arange(kinds + 1))
        kind = np.empty(len(row), np.int64)
        for first in range(0, len(row), 200_000):
            part = slice(first, first + 200_000)
            taste = base[row[part]] + self.drift * when[part, None] * goal[row[part]]
            logits = 1.5 * taste @ vectors.T + random.gumbel(size=(len(taste), kinds))
            logits[:, np.diff(start) == 0] = -np.inf
            kind[part] = logits.argmax(1)
        size = np.diff(start)[kind]
        place = np.minimum((size * random.random(len(row)) ** 2.5).astype(np.int64), size - 1)
        item = by_kind[start[kind] + place]
        noisy = random.random(len(row)) < self.noise
        item[noisy] = random.integers(0, self.items, noisy.sum())
        found: np.ndarray = item
        return found


@dataclass(frozen=True)
class SyntheticNews:
    """Specification of a news site: articles live for days, are read by topic, freshness and quality, and most of tomorrow's
    reads are of articles that nobody has read yet.

    Parameters
    ----------
    users, articles : how many
    events_per_user : mean of a geometric number of reads, at least 2; a second read of an article is dropped
    days : length of the log; articles appear all the time
    topics : of articles and tastes; three of them make a section
    fading : what a day of age costs, in units of the choice's logits
    live_days : when an article is taken down
    seed : draws everything
    """

    users: int = 5_000
    articles: int = 3_000
    events_per_user: float = 20.0
    days: int = 28
    topics: int = 24
    fading: float = 1.5
    live_days: float = 4.0
    seed: int = 0

    def write(self, folder: Path) -> None:
        """Write `events.parquet` and `items.parquet` to `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(self.item_table(), folder / "items.parquet")
        pq.write_table(self.event_table(), folder / "events.parquet")

    def item_table(self) -> pa.Table:
        """item_id string, title (words of the topic among words of all), section, published (us, UTC)."""
        topic, published, _ = self._articles()
        random = np.random.default_rng([self.seed, 6])
        own = random.integers(0, 30, (self.articles, 5))
        common = random.integers(0, 200, (self.articles, 3))
        titles = [
            " ".join([*(_word(100 + 30 * t + word) for word in mine), *(_word(10_000 + word) for word in theirs)])
            for t, mine, theirs in zip(topic.tolist(), own.tolist(), common.tolist(), strict=True)
        ]
        return pa.table(
            {
                "item_id": self._names(),
                "title": titles,
                "section": [f"section {t // 3}" for t in topic.tolist()],
                "published": pa.array(published * 1_000_000, pa.timestamp("us", tz="UTC")),
            }
        )

    def event_table(self) -> pa.Table:
        """user_id int64, item_id string, timestamp (us, UTC), device (phone, desk); in order of time."""
        random = np.random.default_rng([self.seed, 7])
        topic, published, quality = self._articles()
        taste = 1.5 * random.normal(size=(self.users, self.topics))
        by_device = np.stack([np.where(np.arange(self.topics) % 2 == d, 0.8, -0.8) for d in (0, 1)])
        count = 1 + random.geometric(1.0 / max(self.events_per_user - 1.0, 1.0), self.users)
        user = np.repeat(np.arange(self.users), count)
        second = START_S + np.sort(random.random(len(user)) * self.days * 86_400).astype(np.int64)
        user = random.permutation(user)
        device = random.integers(0, 2, len(user))
        order = np.argsort(published, kind="stable")
        item = np.empty(len(user), np.int64)
        for first in range(0, len(user), 1_000):
            part = slice(first, first + 1_000)
            start, stop = np.searchsorted(published[order], [second[part][0] - self.live_days * 86_400, second[part][-1]])
            live = order[start:stop]
            age = (second[part, None] - published[live]) / 86_400
            logits = (taste[user[part]] + by_device[device[part]])[:, topic[live]] + 0.7 * quality[live] - self.fading * age
            logits[(age < 0) | (age > self.live_days)] = -np.inf
            item[part] = live[(logits + random.gumbel(size=logits.shape)).argmax(1)]
        _, once = np.unique(user * self.articles + item, return_index=True)
        once.sort()
        columns = {"user_id": user[once], "item_id": self._names().take(pa.array(item[once]))}
        columns["timestamp"] = pa.array(second[once] * 1_000_000, pa.timestamp("us", tz="UTC"))
        return pa.table({**columns, "device": pa.array(np.array(["phone", "desk"])[device[once]])})

    def _names(self) -> pa.Array:
        return pa.array([f"a{number:06d}" for number in range(self.articles)])

    def _articles(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Topic, second of publication and quality of each article; the first ones are there when the log begins."""
        random = np.random.default_rng([self.seed, 8])
        published = START_S + ((random.random(self.articles) * (self.days + self.live_days) - self.live_days) * 86_400).astype(np.int64)
        return random.integers(0, self.topics, self.articles), published, random.normal(size=self.articles)


def _word(number: int) -> str:
    """A word of syllables for a number, another one for another."""
    syllables = []
    while number:
        number, rest = divmod(number, 70)
        syllables.append("bdfgklmnprstvz"[rest % 14] + "aeiou"[rest // 14])
    return "".join(syllables)


def main(arguments: list[str]) -> None:
    """`python -m recray.testing.synthetic news FOLDER` writes a news site of standard size."""
    if len(arguments) != 2 or arguments[0] != "news":
        raise SystemExit("usage: python -m recray.testing.synthetic news FOLDER")
    SyntheticNews().write(Path(arguments[1]))


if __name__ == "__main__":
    main(sys.argv[1:])
