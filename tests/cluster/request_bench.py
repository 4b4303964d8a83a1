"""What tests of the request table are made of: workers, requests, chunks, and an ingress without its loop."""

from __future__ import annotations

import msgspec

from cluster.request_events import (
    ChunksArrived,
    Deliver,
    End,
    FleetChanged,
    RequestAdded,
    RouterFound,
    SendToRouter,
    SendToWorker,
    TimePassed,
)
from cluster.request_table import RequestLimits, RequestTable
from decode.streams import each_choice
from kvcache.names import pack_tokens
from messages.fleet import WorkerInfo
from messages.request import CancelRequest, GenerateRequest, SamplingParams
from messages.route import Placement, RequestEnded, RouteRequest
from messages.stream import PromptSources, TokenChunk

PROMPT = list(range(5, 45))
SOURCES = PromptSources(computed=len(PROMPT))


def info(worker_id: str, role: str = "decode") -> WorkerInfo:
    return WorkerInfo(
        worker_id=worker_id,
        role=role,
        address=f"tcp://{worker_id}:1",
        node_id="n",
        fingerprint=b"f",
        block_size=16,
        num_blocks=1000,
        block_bytes=1000,
        max_model_len=1000,
        max_num_seqs=100,
        roads=("shm",),
    )


def ask(request_id: str = "r", **params: object) -> GenerateRequest:
    return GenerateRequest(
        request_id=request_id,
        token_ids=pack_tokens(PROMPT),
        num_prompt_tokens=len(PROMPT),
        params=SamplingParams(**{"max_tokens": 10, **params}),
    )


def chunk(request_id: str = "r", *token_ids: int, **fields: object) -> TokenChunk:
    return TokenChunk(request_id=request_id, token_ids=list(token_ids), **fields)


def failed(request_id: str, error: Exception) -> TokenChunk:
    return TokenChunk(request_id=request_id, finish_reason="error", error=error.info())


def placed(request_id: str, worker_id: str, **fields: object) -> Placement:
    return Placement(request_id=request_id, decode_worker=worker_id, decode_address=f"tcp://{worker_id}:1", **fields)


class Ingress:
    """A table that is checked after every event, and what it said last."""

    def __init__(self, *worker_ids: str, has_router: bool = True, max_ttft_s: float = 20.0) -> None:
        self.table = RequestTable(RequestLimits(request_timeout_s=600.0, lost_after_s=3.0, max_ttft_s=max_ttft_s))
        self.now_s = 100.0
        self.said: list[object] = []
        self.set_fleet(*worker_ids)
        if has_router:
            self.tell(RouterFound())

    def set_fleet(self, *worker_ids: str) -> None:
        infos = [info(worker_id, "prefill" if worker_id.startswith("p") else "decode") for worker_id in worker_ids]
        self.tell(FleetChanged({one.worker_id: one for one in infos}))

    def tell(self, event: object) -> list[object]:
        """Chunks that say no position go on where the last one ended."""
        if isinstance(event, ChunksArrived):
            event = ChunksArrived(event.worker_id, self._in_place(event.chunks))
        self.said = self.table.on_event(event, self.now_s)
        self.table.check_invariants()
        return self.said

    def _in_place(self, chunks: list[TokenChunk]) -> list[TokenChunk]:
        ends = {placed_id: len(sequence.token_ids) for placed_id, sequence in self.table._placed.items()}
        found = []
        for one in chunks:
            position = one.position or ends.get(one.request_id, 0)
            found.append(msgspec.structs.replace(one, position=position))
            ends[one.request_id] = position + len(one.token_ids)
        return found

    def wait(self, seconds: float) -> list[object]:
        self.now_s += seconds
        return self.tell(TimePassed())

    def sent(self) -> list[tuple[str, GenerateRequest]]:
        """What workers were given to generate by the last event, each choice by itself."""
        return [
            (one.worker_id, choice)
            for one in self.said
            if isinstance(one, SendToWorker) and isinstance(one.message, GenerateRequest)
            for choice in each_choice(one.message)
        ]

    def cancelled(self) -> list[tuple[str, str]]:
        return [
            (one.worker_id, one.message.request_id)
            for one in self.said
            if isinstance(one, SendToWorker) and isinstance(one.message, CancelRequest)
        ]

    def asked(self) -> list[RouteRequest]:
        return [o.message for o in self.said if isinstance(o, SendToRouter) and isinstance(o.message, RouteRequest)]

    def told_ended(self) -> list[str]:
        return [
            one.message.request_id
            for one in self.said
            if isinstance(one, SendToRouter) and isinstance(one.message, RequestEnded)
        ]

    def delivered(self) -> list[TokenChunk]:
        return [one.chunk for one in self.said if isinstance(one, Deliver)]

    def has_ended(self) -> bool:
        return any(isinstance(one, End) for one in self.said)

    def error(self) -> tuple[str, str | None, int]:
        """What the only chunk delivered says went wrong, and that nothing follows."""
        (last,) = self.delivered()
        assert last.finish_reason == "error"
        assert self.has_ended()
        assert len(self.table) == 0
        return last.error.kind, last.error.code, last.error.status

    def run(self, worker_id: str, *asks: GenerateRequest) -> None:
        """These run on that worker."""
        self.tell(RequestAdded(asks or (ask(),)))
        (route,) = self.asked()
        self.tell(placed(route.request_id, worker_id))
