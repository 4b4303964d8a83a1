"""From logits to tokens. What a row gives depends on that row alone: not on the batch, nor on the worker.

Three things make it so. The uniform number of each output token comes from the sequence's own seed. Everything that
crosses the vocabulary is either a comparison or a sum of integers, so that no order of summation, hence no batch shape
and no number of threads, shows in the result. And candidates have one order: logit downwards, then token id upwards.
"""

from __future__ import annotations

import hashlib
import logging
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.kernels.cpu.native import load_kernels
from engine.sampling.candidates import Candidates, all_in_order, argmax, at_least, leading
from engine.scheduling.plan import Sampled
from messages.errors import InvariantError, KvrayError, RequestError, WorkerError, first_line
from messages.request import Grammar, SamplingParams
from messages.stream import TokenLogprob
from text.grammar import GrammarCompiler, GrammarMatcher

logger = logging.getLogger(__name__)

#: Candidates looked at before more of a row is sorted: they hold 95 % of the mass of most text.
NUM_CANDIDATES = 256
#: Below it, temperature is greedy: float32 logits divided by less would overflow before they differ.
GREEDY_TEMPERATURE = 1e-5
#: Probabilities are summed in units of 2^-40 of the likeliest token's: 2^23 of them fit into 63 bits.
_UNIT = float(2**40)
_NO_CUT = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """The sequence whose next token a row of logits gives."""

    seq_id: str
    params: SamplingParams
    token_ids: Sequence[int]  #: prompt and output so far; not changed
    num_prompt_tokens: int
    #: tokens behind `token_ids` that only the device knows as the step is launched; they are in `token_ids` later
    num_awaited: int = 0

    @property
    def num_output_tokens(self) -> int:
        """Output tokens so far, which is the index of the token to be sampled."""
        return len(self.token_ids) + self.num_awaited - self.num_prompt_tokens

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, without a draw."""
        return self.params.temperature < GREEDY_TEMPERATURE


def uniform(seed: int, choice: int, index: int) -> float:
    """Return the number in [0, 1) that output token `index` of choice `choice` is drawn with: 53 bits of a hash."""
    digest = hashlib.blake2b(struct.pack("<QQQ", seed, choice, index), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


class Sampler:
    """Chooses the next token of each sequence of a step. One thread at a time.

    Keeps, per sequence that needs it, what its tokens' penalties are and the place in its grammar; both are rebuilt
    from the row's tokens when they are missing or ahead of them, so that nothing has to move with a sequence.
    """

    def __init__(self, vocab_size: int, grammars: GrammarCompiler | None) -> None:
        """Make a sampler for rows of `vocab_size`; a row whose grammar is not compiled in `grammars` gets an error."""
        self._vocab_size = vocab_size
        self._known_grammars = grammars
        self._penalties: dict[str, _Penalties] = {}
        self._grammars: dict[str, _GrammarState] = {}
        self._copies = torch.empty((0, vocab_size))  # [most rows that one step changed, vocab_size] float32

    def forget(self, seq_id: str) -> None:
        """Drop what is kept for a sequence that ended or left; unknown ids are ignored."""
        self._penalties.pop(seq_id, None)
        self._grammars.pop(seq_id, None)

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> list[Sampled | KvrayError]:
        """Choose the next token of each row, or say why it has none.

        Args:
            logits: [len(rows), vocab_size] float32, on any device; not changed.
            rows: the sequences whose next tokens these are.

        Raises:
            InvariantError: logits of another shape or dtype.
        """
        if logits.shape != (len(rows), self._vocab_size) or logits.dtype != torch.float32:
            raise InvariantError(
                f"logits are {list(logits.shape)} {logits.dtype}, wanted {[len(rows), self._vocab_size]} float32"
            )
        errors: dict[int, KvrayError] = {}
        shaped = self._shape_rows(logits, rows, errors)
        chosen = self._choose(logits, shaped, rows, errors)
        logprobs = self._logprobs(logits, rows, chosen)
        return [
            errors[index] if index in errors else Sampled(chosen[index], logprobs.get(index))
            for index in range(len(rows))
        ]

    # ---------------------------------------------------------------- penalties, bias, bans, grammar

    def _shape_rows(self, logits: Tensor, rows: Sequence[SamplingRow], errors: dict[int, KvrayError]) -> list[Tensor]:
        """Return the rows to choose from, each [vocab_size]: views of `logits`, copies where something is changed.

        They are valid until the next step, whose copies lie in the same place: fresh memory costs more than what is
        computed in it.
        """
        shaped = list(logits.unbind(0))
        changed = [index for index, row in enumerate(rows) if _is_shaped(row)]
        if self._copies.shape[0] < len(changed):
            self._copies = torch.empty((len(changed), self._vocab_size), device=logits.device)
        for index, copy in zip(changed, self._copies, strict=False):
            row = rows[index]
            try:
                self._shape_row(shaped[index], copy, row)
                shaped[index] = copy
            except KvrayError as error:
                errors[index] = error
            except Exception as error:  # the edge: one row's parameters must not end the others' step
                logger.exception("the next token of sequence %s cannot be chosen", row.seq_id)
                errors[index] = KvrayError(f"its next token cannot be chosen: {first_line(error)}")
        return shaped

    def _shape_row(self, logits: Tensor, shaped: Tensor, row: SamplingRow) -> None:
        """Write one row with all that its parameters change into `shaped`."""
        params = row.params
        if _has_penalty(params):
            self._penalize(logits, shaped, row)
        else:
            shaped.copy_(logits)
        if params.logit_bias:
            self._add_bias(shaped, params.logit_bias)
        banned = _banned(row)
        allowed = None if params.grammar is None else self._allowed_by_grammar(row, params.grammar, shaped.device)
        if allowed is not None:
            shaped.masked_fill_(~allowed, -torch.inf)
        if banned:
            ids = torch.tensor(
                [i for i in banned if 0 <= i < self._vocab_size], dtype=torch.int64, device=shaped.device
            )
            # Where nothing would be left, as of a complete grammar but its end, min_tokens cannot be had and yields.
            left = len(ids) < self._vocab_size if allowed is None else allowed.index_fill(0, ids, value=False).any()
            if left:
                shaped[ids] = -torch.inf

    def _penalize(self, logits: Tensor, shaped: Tensor, row: SamplingRow) -> None:
        penalties = self._penalties.get(row.seq_id)
        if penalties is None or penalties.num_tokens > len(row.token_ids):
            penalties = self._penalties[row.seq_id] = _Penalties(row, logits.device, self._vocab_size)
        penalties.update(row.token_ids)
        penalties.apply(logits, shaped)

    def _add_bias(self, shaped: Tensor, bias: dict[int, float]) -> None:
        unknown = next((token_id for token_id in bias if not 0 <= token_id < self._vocab_size), None)
        if unknown is not None:
            raise RequestError(
                f"logit_bias names token {unknown}, wanted token ids from 0 to {self._vocab_size - 1}",
                param="logit_bias",
            )
        ids = torch.tensor(list(bias), dtype=torch.int64, device=shaped.device)
        shaped[ids] += torch.tensor(list(bias.values()), dtype=torch.float32, device=shaped.device)

    def _allowed_by_grammar(self, row: SamplingRow, grammar: Grammar, device: torch.device) -> Tensor:
        """Return which tokens may come next, [vocab_size] bool."""
        state = self._grammars.get(row.seq_id)
        if state is None or state.num_output_tokens > row.num_output_tokens:
            compiled = None if self._known_grammars is None else self._known_grammars.find(grammar)
            if compiled is None:
                raise KvrayError("its grammar is not compiled: its sequence has ended, or never waited for it")
            state = self._grammars[row.seq_id] = _GrammarState(GrammarMatcher(compiled))
        output = list(row.token_ids[row.num_prompt_tokens + state.num_output_tokens :])
        state.matcher.accept(output)
        state.num_output_tokens += len(output)
        words = torch.from_numpy(state.matcher.mask()).to(device)
        return _BITS.to(device)[words.view(torch.uint8).to(torch.int64)].view(-1)[: self._vocab_size]

    # ---------------------------------------------------------------- choice

    def _choose(
        self, logits: Tensor, shaped: list[Tensor], rows: Sequence[SamplingRow], errors: dict[int, KvrayError]
    ) -> dict[int, int]:
        """Choose a token id for each row. Rows whose likeliest logit is no finite number are put into `errors`."""
        chosen: dict[int, int] = {}
        tops: dict[int, float] = {}
        greedy = [index for index, row in enumerate(rows) if index not in errors and row.is_greedy]
        drawn = [index for index, row in enumerate(rows) if index not in errors and not row.is_greedy]
        for stacked, part in _batches([shaped[index] for index in greedy]):
            ids, values = argmax(stacked)
            chosen.update(zip(greedy[part], ids, strict=True))
            tops.update(zip(greedy[part], values, strict=True))
        if drawn:
            ids, values = _draw_rows([shaped[index] for index in drawn], [rows[index] for index in drawn])
            chosen.update(zip(drawn, ids, strict=True))
            tops.update(zip(drawn, values, strict=True))
        for index, top in tops.items():
            if not np.isfinite(top):
                errors[index] = _no_choice(logits[index], top)
                del chosen[index]
        return chosen

    def _logprobs(self, logits: Tensor, rows: Sequence[SamplingRow], chosen: dict[int, int]) -> dict[int, TokenLogprob]:
        wanted = [index for index in chosen if rows[index].params.logprobs is not None]
        if not wanted:
            return {}
        found = token_logprobs(
            logits[torch.tensor(wanted, device=logits.device)],
            [chosen[index] for index in wanted],
            [rows[index].params.logprobs or 0 for index in wanted],
        )
        return dict(zip(wanted, found, strict=True))


def _no_choice(logits: Tensor, top: float) -> KvrayError:
    """Return why there is nothing to choose from in a row whose largest logit became `top`, which is not finite.

    Another worker may do better where the model's own logits, [vocab_size], are not finite either: its memory or its
    KV may be at fault. Where they are, what the request asks for is.
    """
    own = float(logits.max())
    if not math.isfinite(own):
        return WorkerError(f"the largest logit is {own}, wanted a finite number", code="non_finite_logits")
    what = "allow no token" if top == -math.inf else f"make the largest logit {top}, wanted a finite number"
    return RequestError(f"the request's penalties, biases and grammar together {what}", code="invalid_value")


def _has_penalty(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


def _banned(row: SamplingRow) -> tuple[int, ...]:
    """Return what must not come next, because too little has come."""
    return row.params.stop_token_ids if row.num_output_tokens < row.params.min_tokens else ()


def _is_shaped(row: SamplingRow) -> bool:
    """Tell whether anything changes the row's logits before one is chosen."""
    params = row.params
    return _has_penalty(params) or bool(params.logit_bias or params.grammar or _banned(row))


class _Penalties:
    """What one sequence's tokens take from their logits: a count for each of the vocabulary, on the logits' device.

    So a step takes as long after 131,072 tokens as after one, some 0.06 ms for 152,064 tokens in the compiled kernel
    (AVX-512, one thread). To pick the logits of 88,000 distinct tokens out and put them back takes 0.6 ms.
    """

    def __init__(self, row: SamplingRow, device: torch.device, vocab_size: int) -> None:
        self.num_tokens = 0  #: of the sequence, that were taken in
        self._params = row.params
        self._num_prompt_tokens = row.num_prompt_tokens
        #: [vocab_size] int32: -1 of those that did not come yet, else how often each is in the output
        self._counts = torch.full((vocab_size,), -1, dtype=torch.int32, device=device)
        self._kernels = load_kernels() if device.type == "cpu" else None

    def update(self, token_ids: Sequence[int]) -> None:
        """Take in the tokens that came since the last call."""
        new = torch.from_numpy(np.array(token_ids[self.num_tokens :], np.int64)).to(self._counts.device)
        output = new[max(0, self._num_prompt_tokens - self.num_tokens) :]
        self._counts[new] = self._counts[new].clamp(min=0)
        self._counts.index_add_(0, output, torch.ones_like(output, dtype=torch.int32))
        self.num_tokens = len(token_ids)

    def apply(self, logits: Tensor, out: Tensor) -> None:
        """Write `logits`, [vocab_size], with the penalties into `out`."""
        params, counts = self._params, self._counts
        if self._kernels is not None:
            self._kernels.penalize(logits, counts, params, out)
            return
        repeated = torch.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
        penalized = torch.where(counts >= 0, repeated, logits) - params.frequency_penalty * counts.clamp(min=0).float()
        torch.sub(penalized, params.presence_penalty * (counts > 0), out=out)


@dataclass(slots=True)
class _GrammarState:
    matcher: GrammarMatcher
    num_output_tokens: int = 0  #: those that the matcher has taken


#: [256, 8] bool: the bits of each byte, lowest first
_BITS = ((torch.arange(256).unsqueeze(1) >> torch.arange(8)) & 1).bool()


def _batches(rows: list[Tensor]) -> Iterator[tuple[Tensor, slice]]:
    """Yield the rows that one call handles, [n, vocab]: all on a GPU; one at a time on a CPU, whose cache holds one."""
    if rows and rows[0].device.type == "cpu":
        for index, row in enumerate(rows):
            yield row.unsqueeze(0), slice(index, index + 1)
    elif rows:
        yield torch.stack(rows), slice(0, len(rows))


def _mass(logits: Tensor, tops: NDArray[np.float32], temperatures: NDArray[np.float32]) -> NDArray[np.float64]:
    """Sum exp((logit - top) / temperature) over each row, [n]: the same whatever the order of summation."""
    device = logits.device
    weights = logits - torch.from_numpy(tops).to(device).unsqueeze(1)
    if (temperatures != 1).any():
        weights /= torch.from_numpy(temperatures).to(device).unsqueeze(1)
    units = weights.exp_().mul_(_UNIT).to(torch.int64).sum(dim=1)
    return units.cpu().numpy() / _UNIT


# --------------------------------------------------------------------------------------------------------------- draw


def _draw_rows(logits: list[Tensor], rows: Sequence[SamplingRow]) -> tuple[list[int], list[float]]:
    """Draw a token id for each row; return the rows' largest logits, too: an id is void where that is not finite."""
    settings = _Settings.of(rows)
    parts: list[Candidates] = []
    masses = np.full(len(rows), np.nan)
    with np.errstate(invalid="ignore"):
        for stacked, part in _batches(logits):
            candidates = leading(stacked, min(NUM_CANDIDATES, stacked.shape[1]))
            parts.append(candidates)
            if (settings.top_k[part] == _NO_CUT).any():
                masses[part] = _mass(stacked, candidates.tops, settings.temperature[part])
        candidates = Candidates.joined(parts)
        positions = _draw(candidates, masses, settings)
    tops = candidates.tops
    ids = candidates.ids[np.arange(len(rows)), np.maximum(positions, 0)]
    for index in np.flatnonzero((positions < 0) & np.isfinite(tops)).tolist():
        one = slice(index, index + 1)
        ids[index] = _draw_slowly(logits[index].unsqueeze(0), float(tops[index]), masses[one], settings.part(one))
    return ids.tolist(), tops.tolist()


def _draw_slowly(logits: Tensor, top: float, mass: NDArray[np.float64], settings: _Settings) -> int:
    """Draw the token of one row, [1, vocab], that the first candidates do not decide."""
    share = float(settings.top_p[0] if settings.top_p[0] < 1 else settings.uniform[0])
    if not np.isnan(mass[0]):
        # All tokens together that have less than this weight cannot make up the share that is not needed.
        weight = (1 - share) * float(mass[0]) / logits.shape[1]
        heavy = at_least(logits, top + float(settings.temperature[0]) * math.log(weight))
        position = int(_draw(heavy, mass, settings)[0])
        if position >= 0:
            return int(heavy.ids[0, position])
    whole = all_in_order(logits)
    return int(whole.ids[0, _draw(whole, mass, settings)[0]])


@dataclass(frozen=True, slots=True)
class _Settings:
    """The draw's parameters of n rows, [n] each."""

    temperature: NDArray[np.float32]
    top_k: NDArray[np.int64]  # _NO_CUT: all
    top_p: NDArray[np.float64]
    min_p: NDArray[np.float64]
    uniform: NDArray[np.float64]

    @classmethod
    def of(cls, rows: Sequence[SamplingRow]) -> _Settings:
        params = [row.params for row in rows]
        return cls(
            temperature=np.array([p.temperature for p in params], np.float32),
            top_k=np.array([p.top_k if p.top_k > 0 else _NO_CUT for p in params], np.int64),
            top_p=np.array([p.top_p for p in params], np.float64),
            min_p=np.array([p.min_p for p in params], np.float64),
            uniform=np.array([uniform(row.params.seed, row.params.choice, row.num_output_tokens) for row in rows]),
        )

    def part(self, rows: slice) -> _Settings:
        return _Settings(
            self.temperature[rows], self.top_k[rows], self.top_p[rows], self.min_p[rows], self.uniform[rows]
        )


def _draw(candidates: Candidates, masses: NDArray[np.float64], settings: _Settings) -> NDArray[np.int64]:
    """Draw a candidate of each row: its position, [n]; -1 where the candidates at hand do not decide it.

    top_k, top_p and min_p each keep a leading part of the order, so all that is wanted is where the shortest ends.

        candidates   0 ......... end ... num_sure ... k      kept are [0, end), if end <= num_sure
        cumulative   w0, w0 + w1, ...         drawn is the first that exceeds uniform * cumulative[end - 1]

    Weights are added up from the likeliest on, in float64, so that a longer list of candidates has the same beginning.
    """
    num_sure, is_all = candidates.num_sure, candidates.is_all
    k = candidates.values.shape[1]
    is_sure = np.arange(k) < num_sure[:, None]
    values = candidates.values.astype(np.float64)
    with np.errstate(invalid="ignore"):
        weights = np.exp((values - values[:, :1]) / settings.temperature.astype(np.float64)[:, None])
    weights = np.where(is_sure, weights, 0.0)
    cumulative = np.cumsum(weights, axis=1)

    def upto(end: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.take_along_axis(cumulative, np.clip(end, 1, k)[:, None] - 1, axis=1)[:, 0]

    # Where a cut is at hand it is exact; where it is not, it is beyond num_sure, unless these are all candidates.
    beyond = np.where(is_all, num_sure, _NO_CUT)
    by_k = np.where(settings.top_k <= num_sure, settings.top_k, beyond)
    by_min_p = (is_sure & (weights >= settings.min_p[:, None])).sum(axis=1)
    by_min_p = np.where(by_min_p < num_sure, np.maximum(by_min_p, 1), beyond)
    has_k = settings.top_k != _NO_CUT
    mass = np.where(has_k, np.where(by_k == _NO_CUT, np.nan, upto(by_k)), masses)
    by_p = (is_sure & (cumulative < (settings.top_p * mass)[:, None])).sum(axis=1) + 1
    by_p = np.where((settings.top_p < 1) & (by_p <= num_sure), by_p, beyond)
    end = np.minimum(np.minimum(by_k, by_p), by_min_p)

    is_uncut = ~has_k & (settings.top_p >= 1) & (settings.min_p <= 0)
    target = settings.uniform * np.where(is_uncut, masses, upto(end))
    position = (is_sure & (cumulative <= target[:, None])).sum(axis=1)
    # What rounding puts past the end belongs to the last that has any weight.
    last = (is_sure & (np.arange(k) < end[:, None]) & (weights > 0)).sum(axis=1) - 1
    is_decided = np.where(is_uncut, position < num_sure, (end <= num_sure) & ~((settings.top_p < 1) & np.isnan(mass)))
    return np.where(is_decided | is_all, np.minimum(position, last), -1)


# -------------------------------------------------------------------------------------------------- log-probabilities


def prompt_logprobs(logits: Tensor, targets: Sequence[int], k: int) -> list[TokenLogprob]:
    """Compute the log-probabilities of known tokens, with the k likeliest of each place.

    Args:
        logits: [n, vocab] float32: what precedes each target.
        targets: n token ids.
        k: alternatives, 0 for none.
    """
    return token_logprobs(logits, targets, [k] * len(targets))


def token_logprobs(logits: Tensor, targets: Sequence[int], ks: Sequence[int]) -> list[TokenLogprob]:
    """Do as `prompt_logprobs` with a k for each row; rank and alternatives follow the one order of candidates."""
    size = 1 if logits.device.type == "cpu" else 64  # rows: bounds what the comparisons below take on a GPU
    return [
        found
        for start in range(0, len(targets), size)
        for found in _some_logprobs(
            logits[start : start + size], targets[start : start + size], ks[start : start + size]
        )
    ]


def _some_logprobs(logits: Tensor, targets: Sequence[int], ks: Sequence[int]) -> list[TokenLogprob]:
    num_rows, vocab_size = logits.shape
    first = leading(logits, min(max(*ks, 0) + 1, vocab_size))
    tops = first.tops
    log_norm = tops + np.log(_mass(logits, tops, np.ones(num_rows, np.float32)))
    target = torch.tensor(targets, dtype=torch.int64, device=logits.device).unsqueeze(1)
    at_target = logits.gather(1, target)
    before = (logits > at_target).sum(dim=1)
    before += ((logits == at_target) & (torch.arange(vocab_size, device=logits.device) < target)).sum(dim=1)
    values, ranks = at_target.squeeze(1).tolist(), (before + 1).tolist()
    found = []
    for row, k in enumerate(ks):
        top = _first_k(logits[row], first, row, k)
        pairs = tuple((token_id, value - float(log_norm[row])) for token_id, value in top)
        found.append(TokenLogprob(targets[row], values[row] - float(log_norm[row]), ranks[row], pairs))
    return found


def _first_k(logits: Tensor, first: Candidates, row: int, k: int) -> list[tuple[int, float]]:
    """Return (token id, logit) of the first k candidates of a row, ties at the end resolved."""
    k = min(k, logits.shape[0])
    ids, values = first.ids[row, :k].tolist(), first.values[row, :k].tolist()
    num_sure = int(first.num_sure[row])
    if num_sure < k:
        tied = (logits == values[num_sure]).nonzero().squeeze(1)[: k - num_sure].tolist()
        ids[num_sure:] = tied
    return list(zip(ids, values, strict=True))
