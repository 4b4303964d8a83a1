"""Why blocks of a prompt had to be computed though they might have been cached."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

import msgspec

#: never_seen: nobody was heard to hold it, as far as the router's memory goes back
#: evicted: its last holder dropped it, or did not have it any more when it was asked
#: holder_lost: its last holder went, or did not give it
#: damaged: what came did not have its checksum
#: slower_than_computing: somebody held it, and computing it was cheaper, or came first
MissReason: TypeAlias = Literal["never_seen", "evicted", "holder_lost", "damaged", "slower_than_computing"]

#: Those, and what is no miss: the prompt's end, whose last token is computed in any case; a prompt whose
#: log-probabilities were wanted; and what nobody can tell, as no router placed the request.
ComputedWhy: TypeAlias = Literal[MissReason, "prompt_end", "prompt_logprobs", "not_known"]

MISS_REASONS: Final[tuple[MissReason, ...]] = (
    "never_seen",
    "evicted",
    "holder_lost",
    "damaged",
    "slower_than_computing",
)


class MissedRun(msgspec.Struct, frozen=True, array_like=True):
    """Blocks [begin, end) of a prompt that nobody holds, why, and who held them last where that is known."""

    begin: int
    end: int
    why: MissReason
    holder: str = ""  #: worker id
