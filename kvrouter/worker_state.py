"""The router's view of one worker: what it is, what it last reported, what was promised since."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from kvcache.price import SHORT_TOKENS, SHORT_WAITS
from messages.fleet import LoadReport, WorkerInfo
from messages.price import ComputePrice


class Reserved(NamedTuple):
    """What a placement will take at one worker, until the worker's own report shows it."""

    compute_s: float
    blocks: int
    sequences: int
    short_s: float = 0.0  #: of a short prompt: compute_s
    short_sequences: int = 0  #: of a short prompt: sequences


class Changed(NamedTuple):
    """Requests that came to a worker since it reported last, and then those that went; one may have done both."""

    came: set[str]
    gone: set[str]


@dataclass(slots=True)
class WorkerState:
    """The router's view of one worker: its constants, its last report, and what was promised since."""

    info: WorkerInfo
    load: LoadReport | None = None
    reserved: dict[str, Reserved] = field(default_factory=dict)  #: by request id
    reserved_s: float = 0.0  #: the five are sums over `reserved`
    reserved_blocks: int = 0
    reserved_sequences: int = 0
    reserved_short_s: float = 0.0
    reserved_short_sequences: int = 0
    request_ids: set[str] = field(default_factory=set)  #: sequences it has, as it reported
    report_seq: int | None = None  #: of the last report; None: none came that said all

    def reserve(self, request_id: str, reserved: Reserved) -> None:
        """Count a placement, in the stead of one counted before for the same request."""
        self.release(request_id)
        self.reserved[request_id] = reserved
        self.reserved_s += reserved.compute_s
        self.reserved_blocks += reserved.blocks
        self.reserved_sequences += reserved.sequences
        self.reserved_short_s += reserved.short_s
        self.reserved_short_sequences += reserved.short_sequences

    def release(self, request_id: str) -> None:
        """Count a placement no longer; unknown ids are ignored."""
        reserved = self.reserved.pop(request_id, None)
        if reserved is not None:
            self.reserved_s -= reserved.compute_s
            self.reserved_blocks -= reserved.blocks
            self.reserved_sequences -= reserved.sequences
            self.reserved_short_s -= reserved.short_s
            self.reserved_short_sequences -= reserved.short_sequences
            if not self.reserved:
                self.reserved_s = self.reserved_short_s = 0.0  # what rounding left

    def report(self, load: LoadReport) -> Changed | None:
        """Take in the worker's report: requests that it has need no prediction any more. Return which came and went.

        None: it does not follow the one before, so that nobody knows which requests are there until one says all.
        """
        self.load = load
        follows = self.report_seq is not None and load.seq == self.report_seq + 1
        if load.is_whole:
            now = set(load.request_ids)
            changed = Changed(now - self.request_ids, self.request_ids - now)
        elif follows:
            came = set(load.request_ids)
            changed = Changed(came - self.request_ids, (self.request_ids | came).intersection(load.ended_ids))
        else:
            self.report_seq = None
            return None
        self.report_seq = load.seq
        self.request_ids -= changed.gone
        self.request_ids |= changed.came
        for request_id in self.reserved.keys() & self.request_ids:
            self.release(request_id)
        self.request_ids -= changed.gone  # of those that came, too
        return changed

    def queue_s(self, num_tokens: int) -> float:
        """Return the seconds of prefill, reported and promised, that a prompt with so much to compute waits for."""
        queue_s = self.reserved_s + (self.load.queued_s if self.load else 0.0)
        if num_tokens > SHORT_TOKENS:
            return queue_s
        return min(queue_s, SHORT_WAITS * (self.reserved_short_s + (self.load.queued_short_s if self.load else 0.0)))

    @property
    def num_short(self) -> int:
        """Sequences with short prompts, running, waiting and promised."""
        return self.reserved_short_sequences + (self.load.num_short if self.load else 0)

    @property
    def compute_price(self) -> ComputePrice | None:
        """The price of computing that the worker last reported; None where it never measured one."""
        return (self.load.compute if self.load else None) or self.info.compute

    @property
    def num_sequences(self) -> int:
        """Sequences running, waiting and promised."""
        return self.reserved_sequences + (self.load.num_running + self.load.num_waiting if self.load else 0)

    @property
    def free_blocks(self) -> int:
        """Blocks free or evictable, less what was promised; negative where that was too much."""
        return (self.load.free_blocks if self.load else self.info.num_blocks) - self.reserved_blocks

    @property
    def idle_blocks(self) -> int:
        """Blocks whose loss costs nothing, less what was promised; negative where that was too much."""
        return (self.load.idle_blocks if self.load else self.info.num_blocks) - self.reserved_blocks
