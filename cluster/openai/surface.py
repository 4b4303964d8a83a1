"""The parts that every endpoint works with."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.openai.backend import Backend, HttpLimits, ServedModel
from cluster.openai.errors import model_not_found
from cluster.openai.grammar_checks import GrammarChecks
from cluster.openai.metrics import HttpMetrics
from cluster.openai.tool_calls import ToolFormat
from text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Surface:
    """One served model, seen from HTTP."""

    backend: Backend
    model: ServedModel
    tokenizer: Tokenizer
    grammars: GrammarChecks
    limits: HttpLimits
    metrics: HttpMetrics
    tool_format: ToolFormat | None  #: how the model writes tool calls
    hidden_ids: frozenset[int]  #: special tokens that do not mark tool calls
    max_token_chars: int  #: no token stands for more characters; 0: not known

    def check_model(self, name: str | None) -> None:
        """Check that a request's model is served here; it may leave the name out.

        Raises:
            RequestError: no model of that name is served here (404).
        """
        if name is not None and name not in self.model.names:
            raise model_not_found(name, self.model.names)
