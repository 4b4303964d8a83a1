"""Where the KV of a sequence that begins comes from: holders, a prefill worker, or the engine here."""

from __future__ import annotations

from collections.abc import Callable

from engine.scheduling.backlog import Backlog
from engine.scheduling.coming import Coming
from engine.scheduling.ledger import SequenceLedger
from engine.scheduling.plan import AskRemote, Instruction
from engine.scheduling.remote_pulls import RemotePulls
from engine.scheduling.sequence import Sequence
from kvcache.load_plan import LoadPlan, lacking_runs, plan_loads
from kvcache.price import harm_s, is_clearly_cheaper
from messages.price import MovePrice
from messages.request import Copy

#: Loading may take so many times what was predicted, and so many seconds, before what did not come is computed.
_PATIENCE = 4.0
_PATIENCE_S = 5.0
#: A portion of blocks takes about so long to load, where the head is computed meanwhile: two steps of a busy worker.
_PORTION_S = 0.05


class Sourcing:
    """Decides for sequences that were just admitted; `pulls` asks, `backlog` tells what computing costs.

    `price_of` tells what bringing blocks from a copy costs this worker, None where they cannot come from there.
    `block_bytes` is of a block, `chunk_tokens` of the smallest prefill step, `remote_timeout_s` the longest that others
    are waited for.
    """

    def __init__(
        self,
        ledger: SequenceLedger,
        backlog: Backlog,
        price_of: Callable[[Copy], MovePrice | None],
        *,
        block_bytes: int,
        chunk_tokens: int,
        remote_timeout_s: float,
    ) -> None:
        self._ledger = ledger
        self._backlog = backlog
        self.price_of = price_of
        self._block_bytes = block_bytes
        self._chunk_tokens = chunk_tokens
        self._remote_timeout_s = remote_timeout_s
        self.pulls = RemotePulls(ledger, lambda seq: self.plan(seq).loads)

    def plan(self, seq: Sequence, *, beside: str = "") -> LoadPlan:
        """Decide what of the blocks that `seq` lacks comes from the holders that its request names.

        `beside`: the address of a worker that was asked for all that follows the head, and is not asked for more.
        """
        if not seq.held or seq.max_match_blocks == 0 or not self._ledger.may_pull(seq):
            return LoadPlan()
        pull, pool = seq.pull, self._ledger.pool
        refused = {beside} if pull is None else {beside, *pull.holders}
        begin = seq.num_blocks_for(seq.num_computed)
        end = seq.num_prompt_tokens // seq.block_size if beside else seq.max_match_blocks
        if pull is not None:
            end = min(end, pull.end_tokens // seq.block_size)

        def is_here(index: int) -> bool:
            if pull is not None:
                return pull.blocks.state(index) is not Coming.LACKING or index in pull.asked
            return pool.holds(seq.names[index])

        def price_of(copy: Copy) -> MovePrice | None:
            if copy.address in refused or (pull is not None and copy in pull.failed):
                return None
            return self.price_of(copy)

        own_s = self._backlog.compute_s(seq.num_computed, seq.num_tokens)
        return plan_loads(
            lacking_runs(seq.held, begin, end, is_here),
            price_of,
            block_size=seq.block_size,
            block_bytes=self._block_bytes,
            chunk_tokens=self._chunk_tokens,
            compute=self._backlog.price,
            queue_s=max(0.0, self._backlog.seconds() - own_s),
            num_beside=len(self._ledger.running) - 1,
        )

    def is_cheaper_here(self, seq: Sequence, plan: LoadPlan) -> bool:
        """Tell whether getting what `seq` lacks costs clearly less here than its placement said that a handoff takes.

        The router decided by the same prices; this worker knows better what it holds and what waits here by now.
        """
        if seq.spec.remote_s is None or seq.num_computed >= seq.num_prompt_tokens:
            return True
        start = min(plan.loads[-1].end * seq.block_size if plan.loads else seq.num_computed, seq.num_prompt_tokens - 1)
        computing_s = self._backlog.compute_s(start, seq.num_prompt_tokens)
        alone_s = self._backlog.compute_s(seq.num_computed, seq.num_prompt_tokens)
        loading_s = plan.seconds if plan.loads else 0.0
        # It runs already, and counts in the backlog, and in the harm.
        here_s = self._backlog.seconds() - alone_s + loading_s + computing_s
        return is_clearly_cheaper(here_s + harm_s(computing_s, len(self._ledger.running) - 1), seq.spec.remote_s)

    def load(self, seq: Sequence, plan: LoadPlan, now_s: float, out: list[Instruction]) -> float:
        """Load what `plan` says, and compute the rest: at once where it is mixed, else when all has come.

        Returns:
            By when what did not come is computed.
        """
        num_blocks = sum(load.end - load.begin for load in plan.loads)
        deadline_s = now_s + min(self._remote_timeout_s, _PATIENCE * plan.seconds + _PATIENCE_S)
        pull = self._ledger.begin_pull(seq, deadline_s, plan.loads[-1].end, is_mixed=plan.is_mixed)
        pull.has_last_offer = True
        pull.expected_s = now_s + plan.seconds
        if plan.is_mixed:
            pull.portion_blocks = max(1, int(_PORTION_S / plan.load_s * num_blocks))
            pull.meet_tokens = plan.meet_tokens
        self.pulls.ask(seq, plan.loads, out)
        if pull.is_pulling:
            self.pulls.go_on(seq, out)  # it waits for these, which are its next
        return deadline_s

    def ask_prefill(self, seq: Sequence, now_s: float, out: list[Instruction]) -> float:
        """Have the prefill worker compute what `seq` lacks; a head that others hold comes from them.

        Returns:
            By when what did not come is computed here.
        """
        plan = self.plan(seq, beside=seq.spec.remote_source)
        pull = self._ledger.begin_pull(seq, now_s + self._remote_timeout_s)
        pull.expected_s = now_s + (seq.spec.remote_s or 0.0)
        pull.failed.add(Copy(seq.spec.remote_source, "device"))  # what that worker has it hands over anyway
        self.pulls.ask(seq, plan.loads, out)
        end, last = pull.first_index, (seq.num_prompt_tokens - 1) // seq.block_size
        while end < last and (pull.blocks.state(end) is Coming.ARRIVED or end in pull.asked):
            end += 1
        out.append(AskRemote(seq.seq_id, end * seq.block_size))
        return pull.deadline_s
