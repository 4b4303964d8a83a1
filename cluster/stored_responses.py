"""The responses that all ingresses keep together: each its own, found by the others through the router."""

from __future__ import annotations

import msgspec

from cluster.config import ResponsesConfig, parse_size
from cluster.dispatch import Dispatcher
from cluster.openai.responses.kept import KeptResponses
from cluster.openai.responses.store import ResponseStore, StoredResponse, StoreLimits
from messages.responses import StoredAnswer, StoredQuestion


class OtherIngresses:
    """Implements `OtherStores` over the dispatcher's channel to the router."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    async def ask(self, holder: str, owner: str, response_id: str, *, drops: bool) -> StoredResponse | None:
        """Implement `OtherStores.ask`: what the response was given comes as one."""
        answer = await self._dispatcher.ask_ingress(holder, owner, response_id, drops=drops)
        return None if answer.reply is None else StoredResponse(answer.reply, answer.items, None)


def stored_responses(dispatcher: Dispatcher, config: ResponsesConfig, ingress_id: str) -> KeptResponses:
    """Make the store of the ingress that `dispatcher` belongs to, which other ingresses can ask from now on."""
    limits = StoreLimits(
        max_bytes=parse_size(config.memory), max_responses=config.max_responses, max_age_s=config.max_age_s
    )
    kept = KeptResponses(ResponseStore(limits), ingress_id, OtherIngresses(dispatcher))

    def answer(question: StoredQuestion) -> StoredAnswer:
        found = kept.answer(question.owner, question.response_id, drops=question.drops)
        return StoredAnswer(
            query_id=question.query_id,
            asker=question.asker,
            reply=None if found is None else found.reply,
            items=b"" if found is None else msgspec.json.encode(found.given()),
        )

    dispatcher.answer_with(answer)
    return kept
