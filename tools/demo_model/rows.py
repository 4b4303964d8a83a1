"""Training rows: which lengths, which kinds of text, as token ids with their loss weights."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import random
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor

from tools.demo_model import corpus
from tools.demo_model.corpus import Segment, Variety
from tools.demo_model.records import record_text
from tools.demo_model.tokenizer import special_id
from tools.demo_model.tool_corpus import call_drill, tool_text

TOKENS_PER_STEP = 4096
#: Share of the rows outside drills that are stories, facts and small talk.
CHAT_SHARE = 0.10
#: Share of the rows about notes that ask more often for a thing in focus.
FOCUSED_ROWS = 0.5
#: Texts are drawn this much longer than the row, since characters tell their tokens only roughly.
MARGIN = 1.1
#: Length of the random sequence that a row of the repetition drill repeats, in tokens.
PERIOD = (6, 40)


@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
    """The mixture of text in the rows of one length."""

    num_tokens: int
    num_facts: tuple[int, int] = (1, 4)
    #: Share of a row about notes that the notes take; questions fill the rest.
    notes_share: tuple[float, float] = (0.3, 0.5)
    variety: Variety = corpus.PLAIN
    #: Shares of the rows that are drills: random tokens repeated, notes restated.
    repeated: float = 0.0
    restated: float = 0.0
    #: Shares of the rows that are calls and nothing else, conversations with tools, texts turned into records.
    calls: float = 0.0
    tools: float = 0.0
    records: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Stage:
    """A part of the training, until the model answers its notes or a share of the time is used."""

    #: Each step draws one of them.
    rows: tuple[Rows, ...]
    #: Share of the time at which the stage ends at the latest.
    ends_at: float
    #: From this stage on, positions count as if this many times nearer to one another.
    position_scale: float = 1.0


_MIXED = Variety(wording=0.25, system=0.15, apart=0.2, chatter=0.05)
_ROWS_128 = Rows(128, (2, 6), (0.35, 0.35), repeated=0.03, restated=0.37)
_ROWS_256 = Rows(256, (3, 14), (0.3, 0.5), Variety(wording=0.05), repeated=0.05, restated=0.10)
_ROWS_512 = Rows(512, (6, 28), (0.4, 0.7), Variety(wording=0.15, system=0.1, apart=0.1, chatter=0.05))
_ROWS_1024 = Rows(1024, (10, 45), (0.5, 0.8), _MIXED)
_ROWS_2048 = Rows(2048, (15, 75), (0.5, 0.9), _MIXED)
_ROWS_4096 = Rows(4096, (20, 75), (0.6, 0.9), _MIXED)
_ROWS_CALLS = Rows(96, calls=0.6, records=0.3, repeated=0.1)
_ROWS_TOOLS = Rows(192, tools=0.54, records=0.4, repeated=0.06)
_ROWS_LONG_TOOLS = Rows(512, tools=0.6, records=0.4)
_ROWS_8192 = Rows(8192, (20, 75), (0.8, 0.95), _MIXED)
_NOTES = (_ROWS_256, _ROWS_512, _ROWS_1024, _ROWS_2048, _ROWS_2048, _ROWS_4096, _ROWS_8192)

#: Short rows first: a longer one teaches nothing before the shorter are answered.
STAGES = (
    Stage((_ROWS_128, _ROWS_CALLS, _ROWS_CALLS), 0.10),
    Stage((_ROWS_256, _ROWS_CALLS, _ROWS_CALLS), 0.22),
    Stage((_ROWS_512, _ROWS_CALLS, _ROWS_TOOLS), 0.36),
    Stage((_ROWS_1024, _ROWS_CALLS, _ROWS_TOOLS), 0.50),
    Stage((*_NOTES, *(_ROWS_TOOLS,) * 6, _ROWS_LONG_TOOLS), 1.0, position_scale=8.0),
)


class RowMaker:
    """Draws batches of rows; the same seed gives the same ones."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        """Make a drawer of rows that `tokenizer` cuts, from `seed`."""
        self._tokenizer = tokenizer
        self._rng = random.Random(seed)
        #: Things to ask for more often: those that the model has been seen to miss.
        self.focus: Sequence[str] = ()
        self._pad_id = special_id(tokenizer, corpus.PAD)
        self._merged_ids = range(len(corpus.SPECIAL_TOKENS) + len(corpus.MARKS) + 256, tokenizer.get_vocab_size())

    def batch(self, kind: Rows) -> tuple[Tensor, Tensor]:
        """Draw `TOKENS_PER_STEP` tokens: ids int64 and weights float32, both [num_rows, kind.num_tokens + 1]."""
        num_rows = max(1, TOKENS_PER_STEP // kind.num_tokens)
        ids, weights = zip(*(self._row(kind) for _ in range(num_rows)), strict=True)
        return torch.tensor(ids), torch.tensor(weights)

    def _row(self, kind: Rows) -> tuple[list[int], list[float]]:
        rng, length = self._rng, kind.num_tokens + 1
        wanted = round(length * MARGIN)
        num_facts = rng.randint(*kind.num_facts)
        drill = rng.random()
        if drill < kind.repeated:
            return self._repeated(length)
        if drill < kind.repeated + kind.restated:
            return self._encoded(corpus.restated_text(rng, wanted, num_facts), length)
        drill -= kind.repeated + kind.restated
        if drill < kind.calls:
            return self._encoded(call_drill(rng, wanted), length)
        drill -= kind.calls
        if drill < kind.tools:
            return self._encoded(tool_text(rng, wanted), length)
        if drill < kind.tools + kind.records:
            return self._encoded(record_text(rng, wanted), length)
        if rng.random() < CHAT_SHARE:
            return self._encoded(corpus.chat_text(rng, wanted, kind.variety), length)
        notes_share = rng.uniform(*kind.notes_share)
        focus = self.focus if rng.random() < FOCUSED_ROWS else ()
        segments = corpus.lookup_text(
            rng, wanted, num_facts, notes_share=notes_share, variety=kind.variety, focus=focus
        )
        return self._encoded(segments, length)

    def _repeated(self, length: int) -> tuple[list[int], list[float]]:
        """Draw random tokens, over and over; all but the first round count."""
        period = self._rng.randint(PERIOD[0], min(PERIOD[1], length // 3))
        tokens = self._rng.choices(self._merged_ids, k=period)
        ids = list(itertools.islice(itertools.cycle(tokens), length))
        return ids, [0.0] * period + [corpus.ANSWER_WEIGHT] * (length - period)

    def _encoded(self, segments: list[Segment], length: int) -> tuple[list[int], list[float]]:
        """Encode the first `length` tokens; short rows are padded."""
        ids, weights = encoded(self._tokenizer, segments)
        padding = [self._pad_id] * (length - len(ids))
        return ids[:length] + padding, weights[:length] + [0.0] * len(padding)


def encoded(tokenizer: Tokenizer, segments: Sequence[Segment]) -> tuple[list[int], list[float]]:
    """Encode segments; each token has the weight of the segment it begins in."""
    encoding = tokenizer.encode(corpus.joined(segments))
    ends = list(itertools.accumulate(len(segment.text) for segment in segments))
    return encoding.ids, [segments[bisect.bisect_right(ends, start)].weight for start, _ in encoding.offsets]
