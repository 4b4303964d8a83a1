"""Explained requests of the fleet: what this ingress knows, what others do, and what the router priced."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence

import msgspec

from cluster.caches import PromptTokens, names_of
from cluster.dispatch import Dispatcher
from cluster.explained_runs import Asked, ExplainedRun, expected_runs
from cluster.openai.callers import Caller
from cluster.openai.errors import shown
from cluster.openai.route_protocol import PlacementCandidate, PlacementParts, PredictedRoute, RouteReply, RouteRun
from cluster.route_log import RouteLog, RouteRecord
from cluster.route_sentences import how_long, what_happened, why_won
from kvcache.names import TOKEN_BYTES
from messages.errors import CapacityError, RequestError, WorkerError, error_from_info
from messages.explain import ExplainPlacement, PlacementExplained, RecordAnswer, RecordQuestion
from messages.fleet import WorkerInfo
from messages.route import RouteRequest


class Routes:
    """One per ingress. `log`: its own requests; None: none are kept."""

    def __init__(self, dispatcher: Dispatcher, log: RouteLog | None, model: str, max_kept: int) -> None:
        self._dispatcher = dispatcher
        self._log = log
        self._model = model
        self._max_kept = max_kept
        dispatcher.answer_records_with(self._answer)

    async def find(self, caller: Caller, request_id: str) -> RouteReply:
        """Explain a request of this id, whichever ingress served it; of several the one that this ingress served.

        Raises:
            RequestError: none of that id is kept, or it is not the caller's (404).
            CapacityError, WorkerError: whoever may know it cannot be asked.
        """
        tenant = _tenant(caller)
        replies = self._own(request_id, 1, tenant) or await self._others(request_id, 1, tenant)
        if not replies:
            raise RequestError(
                f"request_id: got {shown(request_id)}, want {self._wanted()}",
                param="request_id",
                code="not_found",
                status=404,
            )
        (reply, placed_id) = max(replies, key=lambda found: found[0].began_s)
        if reply.placed_by != "router":
            return await self._with_names(reply)
        try:
            told = await self._dispatcher.ask_router(ExplainPlacement(query_id="", request_id=placed_id))
        except (CapacityError, WorkerError):  # the router that knew is gone
            return await self._with_names(reply)
        assert isinstance(told, PlacementExplained)
        return await self._with_names(_with_candidates(reply, told))

    async def newest(self, caller: Caller, limit: int) -> list[RouteReply]:
        """Return the requests of all ingresses that began last, the newest first, without what was priced for them.

        Other ingresses that cannot be asked are left out.
        """
        tenant = _tenant(caller)
        try:
            others = await self._others(None, limit, tenant)
        except (CapacityError, WorkerError):
            others = []
        found = [reply for reply, _ in (*self._own(None, limit, tenant), *others)]
        newest = sorted(found, key=lambda reply: reply.began_s, reverse=True)[:limit]
        names = await self._names()
        return [_named(reply, names) for reply in newest]

    async def predict(self, prompt: PromptTokens, max_tokens: int) -> RouteReply:
        """Explain where a prompt would go if it came now. Reserves nothing.

        Raises:
            CapacityError, RequestError: it would be refused, or there is no router.
            WorkerError: the router does not answer.
        """
        worker = next((info for info in self._dispatcher.fleet.values() if info.role == "decode"), None)
        if worker is None:
            raise CapacityError("no decode worker is there", status=503, code="no_workers", retry_after_s=1.0)
        num_tokens = len(prompt.token_bytes) // TOKEN_BYTES
        route = RouteRequest(
            request_id="explain",
            names=await names_of(prompt, worker.fingerprint, worker.block_size),
            num_prompt_tokens=num_tokens,
            max_tokens=max_tokens,
        )
        told = await self._dispatcher.ask_router(ExplainPlacement(query_id="", route=route))
        assert isinstance(told, PlacementExplained)
        if told.error is not None:
            raise error_from_info(told.error)
        chosen = next(one for one in told.placements if one.is_chosen)
        address = (
            self._dispatcher.fleet[chosen.decode_worker].address
            if chosen.decode_worker in self._dispatcher.fleet
            else ""
        )
        asked = Asked(num_tokens, worker.block_size, address, told.held, told.missing)
        reply = RouteReply(
            request_id=None,
            began_s=time.time(),
            model=self._model,
            num_prompt_tokens=num_tokens,
            num_cached_tokens=num_tokens - chosen.num_computed_tokens,
            num_sequences=1,
            num_placements=0,
            state="predicted",
            placed_by="router",
            reason=told.reason,
            decode_worker=chosen.decode_worker,
            prefill_worker=chosen.prefill_worker,
            predicted_ttft_s=chosen.ttft_s,
            ttft_s=None,
            predicted=PredictedRoute(),
            runs=_runs(expected_runs(asked)),
            error=None,
            sentences=[],
        )
        return await self._with_names(_with_candidates(reply, told))

    # ------------------------------------------------------------------------------------------------- who knows it

    def _wanted(self) -> str:
        if self._log is None:
            return "observability.level: on, without which nothing is kept of requests"
        if not self._max_kept:
            return "observability.explained_requests above 0, without which no request is kept"
        return (
            f"one of the last {self._max_kept} that an ingress answered, the id in a reply or its x-request-id "
            "(setting observability.explained_requests)"
        )

    def _own(self, request_id: str | None, limit: int, tenant: int | None) -> list[tuple[RouteReply, str]]:
        if self._log is None:
            return []
        if request_id is None:
            records: Sequence[RouteRecord] = self._log.newest(limit, tenant)
        else:
            found = self._log.find(request_id, tenant)
            records = [] if found is None else [found]
        return [(_reply(record, self._model), record.placed_id) for record in records]

    def _answer(self, question: RecordQuestion) -> RecordAnswer:
        """Answer another ingress."""
        found = self._own(question.request_id, question.limit, question.tenant)
        return RecordAnswer(query_id=question.query_id, asker=question.asker, records=msgspec.json.encode(found))

    async def _others(self, request_id: str | None, limit: int, tenant: int | None) -> list[tuple[RouteReply, str]]:
        """Ask all other ingresses; who does not answer counts only where nobody knows the request.

        Raises:
            CapacityError: there is no router now, which passes it on.
            WorkerError: it, or an ingress that may know the request, does not answer in time.
        """
        ingresses = (await self._dispatcher.router_stats()).ingresses
        answers = await asyncio.gather(
            *(self._dispatcher.ask_records(one.worker_id, tenant, request_id, limit) for one in ingresses),
            return_exceptions=True,
        )
        found: list[tuple[RouteReply, str]] = []
        failures: list[BaseException] = []
        for answer in answers:
            if isinstance(answer, BaseException):
                failures.append(answer)
            elif answer.records is not None:
                found += msgspec.json.decode(answer.records, type=list[tuple[RouteReply, str]])
        if failures and not found:
            raise failures[0]
        return found

    async def _with_names(self, reply: RouteReply) -> RouteReply:
        return _named(reply, await self._names())

    async def _names(self) -> dict[str, str]:
        """Return who listens where: workers, and the node caches that the router hears."""
        infos: list[WorkerInfo] = list(self._dispatcher.fleet.values())
        with contextlib.suppress(CapacityError, WorkerError):  # without a router they are known by their addresses
            infos += [cache.info for cache in (await self._dispatcher.router_stats()).caches]
        return {info.address: info.worker_id for info in infos}


def _tenant(caller: Caller) -> int | None:
    """Return whose requests a caller sees: its tenant's, or everybody's."""
    return None if caller.is_operator else caller.owner(None)


def _reply(record: RouteRecord, model: str) -> RouteReply:
    if record.error:
        state = "failed"
    elif record.ttft_s is not None:
        state = "answered"
    elif record.has_left:
        state = "left"
    else:
        state = "running" if record.decode_worker else "waiting"
    return RouteReply(
        request_id=record.request_id,
        began_s=record.began_s,
        model=model,
        num_prompt_tokens=record.num_prompt_tokens,
        num_cached_tokens=None if record.sources is None else record.sources.cached,
        num_sequences=record.num_sequences,
        num_placements=record.num_placements,
        state=state,
        placed_by=record.placed_by or None,
        reason=record.reason,
        decode_worker=record.decode_worker or None,
        prefill_worker=record.prefill_worker,
        predicted_ttft_s=record.predicted_ttft_s,
        ttft_s=record.ttft_s,
        predicted=PredictedRoute(),
        runs=_runs(record.runs),
        error=record.error or None,
        sentences=[],
    )


def _runs(runs: Sequence[ExplainedRun]) -> list[RouteRun]:
    return [
        RouteRun(
            begin=run.begin,
            end=run.end,
            source=run.source,
            holder=run.holder,
            why=run.why,
            missed_holder=run.missed_holder or None,
        )
        for run in runs
    ]


def _with_candidates(reply: RouteReply, told: PlacementExplained) -> RouteReply:
    candidates = [
        PlacementCandidate(
            decode_worker=one.decode_worker,
            prefill_worker=one.prefill_worker,
            cost_s=one.cost_s,
            ttft_s=one.ttft_s,
            parts=PlacementParts(
                wait_s=one.wait_s,
                load_s=one.load_s,
                queue_s=one.queue_s,
                compute_s=one.compute_s,
                handoff_s=one.handoff_s,
                crowding_s=one.crowding_s,
                displaced_s=one.displaced_s,
            ),
            matched_tokens=one.matched_tokens,
            num_computed_tokens=one.num_computed_tokens,
            is_chosen=one.is_chosen,
        )
        for one in told.placements
    ]
    predicted = PredictedRoute(candidates=candidates, num_possible=told.num_possible)
    return msgspec.structs.replace(reply, predicted=predicted)


def _named(reply: RouteReply, names: Mapping[str, str]) -> RouteReply:
    """Call holders by their ids where these are known, and say in sentences what it comes to."""
    own = reply.decode_worker or ""
    runs = [
        msgspec.structs.replace(
            run,
            holder=names.get(run.holder, run.holder) or own,
            missed_holder=None if run.missed_holder is None else names.get(run.missed_holder, run.missed_holder),
        )
        for run in reply.runs
    ]
    is_expected = reply.state == "predicted"
    sentences = [
        why_won(reply.predicted.candidates),
        what_happened(runs, is_expected=is_expected),
        how_long(reply.predicted_ttft_s, reply.ttft_s),
    ]
    return msgspec.structs.replace(reply, runs=runs, sentences=[one for one in sentences if one])
