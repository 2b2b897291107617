"""Rewards by position, and what was really shown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recray.events.rewards import MAX_POSITION_WEIGHT, SHOWN, Credits, Rewards

ITEMS = [f"i{number}" for number in range(12)]


@given(st.integers(0, 11), st.floats(0, 2), st.integers(1, 50), st.booleans())
def test_an_outcome_counts_by_the_inverse_propensity_of_its_position(place, bias, shown_at, is_reported):
    credits = Credits(Rewards({"click": 2.0}, 1.0, bias))
    credits.add_response("r", ITEMS)
    if is_reported:
        assert credits.add_outcome("r", SHOWN, ITEMS[place], float(shown_at)) == 0.0
    assert credits.was_shown("r") == is_reported
    position = shown_at if is_reported else place + 1
    expected = 2.0 * min(position**bias, MAX_POSITION_WEIGHT)
    assert credits.add_outcome("r", "click", ITEMS[place], 1.0) == pytest.approx(expected)
    assert credits.add_outcome("r", "click", ITEMS[place], 1.0) == 0.0, "once"
    assert credits.add_outcome("r", "click", None, 1.0) == 2.0, "the response as a whole has no position"


def test_items_that_were_not_in_the_response_were_not_shown():
    credits = Credits(Rewards({"click": 1.0}, 1.0))
    credits.add_response("r", ITEMS)
    credits.add_outcome("r", SHOWN, "another", 1.0)
    assert not credits.was_shown("r") and not credits.was_shown("unknown")
    credits.add_outcome("late", SHOWN, ITEMS[0], 3.0)
    credits.add_response("late", ITEMS)
    assert credits.was_shown("late"), "the report came before the response"
