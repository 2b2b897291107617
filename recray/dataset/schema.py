"""Names of columns in input files, and the Arrow schemas of what recray writes.

Owns the column names that all other modules use; does no reading or writing.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

USER_ID = "user_id"
ITEM_ID = "item_id"
TIMESTAMP = "timestamp"
POSITION = "position"
EVENT = "event"
VALUE = "value"
BASKET = "basket"
EVENT_ID = "event_id"

EVENT_COLUMNS = (USER_ID, ITEM_ID, TIMESTAMP, POSITION, EVENT, VALUE, BASKET, EVENT_ID)
DEFAULT_EVENT = "interaction"
AVAILABLE_FROM = "released_s"  # column of a dataset's item table: from when an item is available
DISPLAY = "display_"  # prefix of columns of a dataset's item table that people see, as text
LONGEST_ID = 1000  # characters of a user id or an item id
CONTEXT = "context_"  # prefix of columns of request context

LIVE_EVENTS = pa.schema(  # events that the endpoint collected; ids as text, context as JSON
    [
        ("number", pa.int64()),
        (USER_ID, pa.string()),
        (ITEM_ID, pa.string()),
        (TIMESTAMP, pa.timestamp("us", "UTC")),
        (EVENT, pa.string()),
        (VALUE, pa.float32()),
        ("context", pa.string()),
        (EVENT_ID, pa.string()),  # from the caller; files written before 0.2 lack it
    ]
)


def shard_schema(user_type: pa.DataType, context: Sequence[str] = ()) -> pa.Schema:
    """Schema of one dataset shard: one row per user in ascending order of `user_id`; `context` names columns
    of codes.
    """
    return pa.schema(
        [
            pa.field(USER_ID, user_type, nullable=False),
            pa.field("item_index", pa.list_(pa.field("item", pa.int32(), nullable=False))),
            pa.field("event_index", pa.list_(pa.field("item", pa.int16(), nullable=False))),
            pa.field("timestamp_s", pa.list_(pa.field("item", pa.int64(), nullable=False))),
            pa.field("value", pa.list_(pa.field("item", pa.float32(), nullable=False))),
            *(
                pa.field(CONTEXT + name, pa.list_(pa.field("item", pa.int16(), nullable=False)))
                for name in context
            ),
            pa.field("basket", pa.list_(pa.field("item", pa.int32(), nullable=False))),
        ]
    )


def snapshot_schema(user_type: pa.DataType, item_type: pa.DataType) -> pa.Schema:
    """Schema of one snapshot part: one row per user in ascending order of `user_id`."""
    return pa.schema(
        [
            pa.field(USER_ID, user_type, nullable=False),
            pa.field("item_ids", pa.list_(item_type)),
            pa.field("scores", pa.list_(pa.float32())),
            pa.field("source", pa.string(), nullable=False),
            pa.field("state", pa.list_(pa.float32())),
        ]
    )
