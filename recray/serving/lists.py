"""Lists as resources: `GET /v1/lists/{user_id}`, with an ETag and a lifetime for caches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import xxhash

from recray.serving.api import ListQuery, RecommendRequest, RecommendResponse

if TYPE_CHECKING:
    from recray.serving.service import Service


async def rank_list(
    service: Service, user_id: str, query: ListQuery, if_none_match: str | None
) -> tuple[RecommendResponse, str, bool]:
    """A user's list, its ETag, and whether the client has it: then it is no impression. Raises as
    `Service.recommend`.
    """
    request = RecommendRequest(user_id=user_id, **query.model_dump(exclude_unset=True))

    def is_shown(response: RecommendResponse) -> bool:
        return not is_known(make_tag(response), if_none_match)

    response = await service.recommend(request, is_shown)
    return response, make_tag(response), not is_shown(response)


def make_tag(response: RecommendResponse) -> str:
    """The ETag of a list, weak: the same for responses that differ by their `request_id` alone."""
    content = response.model_dump_json(exclude={"request_id"}, exclude_none=True)
    return f'W/"{xxhash.xxh3_64_hexdigest(content.encode())}"'


def is_known(tag: str, if_none_match: str | None) -> bool:
    """Whether a client has the list: one of the tags in its If-None-Match (RFC 9110, weak comparison)."""
    if if_none_match is None:
        return False
    sent = [part.strip().removeprefix("W/") for part in if_none_match.split(",")]
    return "*" in sent or tag.removeprefix("W/") in sent


def cache_control(seconds: int, response: RecommendResponse) -> str:
    """The lifetime of a list: a user's own, and none for one that a fallback made."""
    return f"private, max-age={seconds}" if seconds and not response.degraded else "private, no-cache"
