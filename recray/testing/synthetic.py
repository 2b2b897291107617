"""Synthetic data sets: event logs of any size from a seed.

Users have tastes that drift. Items have a vector, a category, a brand, a price and a popularity. Interactions
follow taste, popularity and friends, and some are noise. The same seed and size always give the same rows.
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
    """Specification of a synthetic shop.

    Parameters
    ----------
    users, items : numbers of them
    events_per_user : mean of a geometric number of events, at least 3
    days : length of the log
    taste_dim : dimensions of taste
    drift : change of a taste over the log, 0 to 1
    noise : share of random events
    repeat : share of events that repeat an earlier item of the user
    friends : friends of each user
    seed : of all random numbers
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
                "tags": [
                    [f"kind {kind}", f"brand {number}"] for kind, number in zip(category, brand, strict=True)
                ],
            }
        )

    def social_table(self) -> pa.Table:
        """user_id, friend_id: friends have neighbouring numbers, and neighbours share a base taste."""
        user = np.repeat(np.arange(self.users), self.friends)
        friend = (user + np.tile(np.arange(1, self.friends + 1), self.users)) % self.users
        return pa.table({"user_id": user, "friend_id": friend})

    def event_tables(self) -> Iterator[pa.Table]:
        """user_id int64, item_id string, timestamp (us, UTC), event (view, cart, purchase), value; a chunk of
        users at a time.
        """
        for chunk, first in enumerate(range(0, self.users, _CHUNK_USERS)):
            yield self._events(chunk, np.arange(first, min(first + _CHUNK_USERS, self.users)))

    def _categories(self) -> np.ndarray:
        return np.random.default_rng([self.seed, 2]).integers(0, 4 * self.taste_dim, self.items)

    def _events(self, chunk: int, users: np.ndarray) -> pa.Table:
        random = np.random.default_rng([self.seed, 3, chunk])
        count = 3 + random.geometric(1.0 / max(self.events_per_user - 3.0, 1.0), len(users)) - 1
        row = np.repeat(np.arange(len(users)), count)
        time_share = random.random(len(row))
        order = np.lexsort((time_share, row))
        time_share = time_share[order]
        item = self._draw_items(random, users, row, time_share)
        earlier = np.arange(len(row)) - (
            random.random(len(row)) * (np.arange(len(row)) - (np.cumsum(count) - count)[row])
        ).astype(int)
        is_repeat = random.random(len(row)) < self.repeat
        item[is_repeat] = item[np.minimum(earlier, np.arange(len(row)))[is_repeat]]
        seconds = START_S + (time_share * self.days * 86_400).astype(np.int64)
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

    def _draw_items(
        self, random: np.random.Generator, users: np.ndarray, row: np.ndarray, time_share: np.ndarray
    ) -> np.ndarray:
        """An item for each event: a category by taste at that time, then an item of it by popularity."""
        kinds = 4 * self.taste_dim
        vectors = np.random.default_rng([self.seed, 4]).normal(size=(kinds, self.taste_dim))
        # users of a circle of friends share a base taste, so that friends' events are informative
        circle = np.random.default_rng([self.seed, 5]).normal(
            size=(self.users // (self.friends + 1) + 1, self.taste_dim)
        )
        base = circle[users // (self.friends + 1)] + 0.5 * random.normal(size=(len(users), self.taste_dim))
        drift_direction = random.normal(size=(len(users), self.taste_dim))
        category = self._categories()
        by_kind = np.argsort(category, kind="stable")
        start = np.searchsorted(category[by_kind], np.arange(kinds + 1))
        kind = np.empty(len(row), np.int64)
        for first in range(0, len(row), 200_000):
            part = slice(first, first + 200_000)
            taste = base[row[part]] + self.drift * time_share[part, None] * drift_direction[row[part]]
            logits = 1.5 * taste @ vectors.T + random.gumbel(size=(len(taste), kinds))
            logits[:, np.diff(start) == 0] = -np.inf
            kind[part] = logits.argmax(1)
        size = np.diff(start)[kind]
        popularity_rank = np.minimum((size * random.random(len(row)) ** 2.5).astype(np.int64), size - 1)
        item = by_kind[start[kind] + popularity_rank]
        noisy = random.random(len(row)) < self.noise
        item[noisy] = random.integers(0, self.items, noisy.sum())
        result: np.ndarray = item
        return result


@dataclass(frozen=True)
class SyntheticNews:
    """Specification of a synthetic news site. Articles live for days and are read by topic, freshness and
    quality, so most reads of the next day are of cold items.

    Parameters
    ----------
    users, articles : numbers of them
    events_per_user : mean of a geometric number of reads, at least 2; repeated reads are dropped
    days : length of the log; articles are published all the time
    topics : of articles and tastes; three topics are a section
    fading : cost of a day of age, in units of the logits
    live_days : days until an article is removed
    seed : of all random numbers
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
        """item_id string, title (words of the topic and common words), section, published (us, UTC)."""
        topic, published, _ = self._articles()
        random = np.random.default_rng([self.seed, 6])
        own = random.integers(0, 30, (self.articles, 5))
        common = random.integers(0, 200, (self.articles, 3))
        titles = [
            " ".join(
                [
                    *(_make_word(100 + 30 * t + word) for word in topic_words),
                    *(_make_word(10_000 + word) for word in common_words),
                ]
            )
            for t, topic_words, common_words in zip(
                topic.tolist(), own.tolist(), common.tolist(), strict=True
            )
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
        time_s = START_S + np.sort(random.random(len(user)) * self.days * 86_400).astype(np.int64)
        user = random.permutation(user)
        device = random.integers(0, 2, len(user))
        order = np.argsort(published, kind="stable")
        item = np.empty(len(user), np.int64)
        for first in range(0, len(user), 1_000):
            part = slice(first, first + 1_000)
            start, stop = np.searchsorted(
                published[order], [time_s[part][0] - self.live_days * 86_400, time_s[part][-1]]
            )
            live = order[start:stop]
            age = (time_s[part, None] - published[live]) / 86_400
            logits = (
                (taste[user[part]] + by_device[device[part]])[:, topic[live]]
                + 0.7 * quality[live]
                - self.fading * age
            )
            logits[(age < 0) | (age > self.live_days)] = -np.inf
            item[part] = live[(logits + random.gumbel(size=logits.shape)).argmax(1)]
        _, first_reads = np.unique(user * self.articles + item, return_index=True)
        first_reads.sort()
        columns = {"user_id": user[first_reads], "item_id": self._names().take(pa.array(item[first_reads]))}
        columns["timestamp"] = pa.array(time_s[first_reads] * 1_000_000, pa.timestamp("us", tz="UTC"))
        return pa.table({**columns, "device": pa.array(np.array(["phone", "desk"])[device[first_reads]])})

    def _names(self) -> pa.Array:
        return pa.array([f"a{number:06d}" for number in range(self.articles)])

    def _articles(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Topic, time of publication in seconds and quality of each article; the first are published before
        the log begins.
        """
        random = np.random.default_rng([self.seed, 8])
        published = START_S + (
            (random.random(self.articles) * (self.days + self.live_days) - self.live_days) * 86_400
        ).astype(np.int64)
        return random.integers(0, self.topics, self.articles), published, random.normal(size=self.articles)


def _make_word(number: int) -> str:
    """A word of syllables, unique to the number."""
    syllables = []
    while number:
        number, rest = divmod(number, 70)
        syllables.append("bdfgklmnprstvz"[rest % 14] + "aeiou"[rest // 14])
    return "".join(syllables)


def main(arguments: list[str]) -> None:
    """`python -m recray.testing.synthetic news FOLDER` writes a news site of the default size."""
    if len(arguments) != 2 or arguments[0] != "news":
        raise SystemExit("usage: python -m recray.testing.synthetic news FOLDER")
    SyntheticNews().write(Path(arguments[1]))


if __name__ == "__main__":
    main(sys.argv[1:])
