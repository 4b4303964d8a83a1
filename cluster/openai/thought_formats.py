"""How models write thoughts: one table, by the names that vLLM's --reasoning-parser has.

    OPEN thought CLOSE [BETWEEN] [LEAD] answer

`cluster.openai.thoughts` reads them, and `cluster.openai.thought_grammar` says what may stand before a structure.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from cluster.openai.marks import suffixed


@dataclass(frozen=True, slots=True, kw_only=True)
class ThoughtFormat:
    """One way to write thoughts. Marks are literal texts, the usual one first; the longest that fits is taken."""

    opens: tuple[str, ...]  #: begin a thought
    closes: tuple[str, ...]  #: end it
    yields: tuple[str, ...] = ()  #: end it too, and belong to what follows
    #: an output without an opening mark begins with a thought, unless the client wants none
    is_implied: bool = False
    is_repeated: bool = False  #: thoughts may follow content
    is_kept: bool = False  #: thoughts, with their marks, are content
    between: str = ""  #: after a thought, before what else comes
    lead: str = ""  #: before an answer
    drops: tuple[str, ...] = ()  #: frames around content, not meant for clients

    @property
    def marks(self) -> tuple[str, ...]:
        """Whatever a text of this format must keep until it is read, if it is a special token."""
        return (*self.opens, *self.closes, *self.drops, self.between, self.lead)

    def with_suffix(self, suffix: str) -> ThoughtFormat:
        """Return the format with `suffix` in its tags: <think> is then <thinkSUFFIX>."""
        return replace(self, opens=suffixed(self.opens, suffix), closes=suffixed(self.closes, suffix))


_THINK: Final = ThoughtFormat(opens=("<think>",), closes=("</think>",))
_THINKS_FIRST: Final = replace(_THINK, is_implied=True)
_COHERE: Final = ThoughtFormat(
    opens=("<|START_THINKING|>",),
    closes=("<|END_THINKING|>",),
    lead="<|START_RESPONSE|>",
    drops=("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>"),
)

#: By the names of vLLM 0.32, but for `hf`, which reads what a tokenizer says of its own format. Where a template fits
#: several formats it is taken for the first.
THOUGHT_FORMATS: Final[dict[str, ThoughtFormat]] = {
    "openai_gptoss": ThoughtFormat(
        opens=("<|channel|>analysis<|message|>", "<|start|>assistant<|channel|>analysis<|message|>"),
        closes=("<|end|>",),
        yields=("<|start|>", "<|channel|>"),
        is_repeated=True,
        between="<|start|>assistant",
        lead="<|channel|>final<|message|>",
        drops=(
            *(
                f"{start}<|channel|>{channel}<|message|>"
                for start in ("", "<|start|>assistant")
                for channel in (
                    "final",
                    "final <|constrain|>json",
                    "final<|constrain|>json",
                    "final json",
                    "commentary",
                )
            ),
            "<|start|>assistant",
            "<|end|>",
            "<|return|>",
            "<|call|>",
        ),
    ),
    "gemma4": ThoughtFormat(
        opens=("<|channel>thought\n", "<|channel>thought", "<|channel>"), closes=("<channel|>",), is_repeated=True
    ),
    "cohere_command3": _COHERE,
    "cohere_command4": replace(_COHERE, lead="<|START_TEXT|>"),
    "kimi_k3": ThoughtFormat(
        opens=("<|open|>think<|sep|>",),
        closes=("<|close|>think<|sep|>",),
        is_implied=True,
        lead="<|open|>response<|sep|>",
        drops=(
            "<|open|>response<|sep|>",
            "<|close|>response<|sep|>",
            "<|close|>message<|sep|>",
            "<|end_of_msg|>",
        ),
    ),
    "inkling": ThoughtFormat(
        opens=("<|content_thinking|>", "<|message_model|><|content_thinking|>"),
        closes=("<|end_message|>",),
        yields=("<|content_model_end_sampling|>",),
        is_repeated=True,
        between="<|message_model|>",
        lead="<|content_text|>",
        drops=("<|message_model|>", "<|content_text|>", "<|end_message|>", "<|content_model_end_sampling|>"),
    ),
    "muse_glimmer": ThoughtFormat(
        opens=(" to=self<|message|>", "<|start|>assistant to=self<|message|>"),
        closes=("<|eom|>", "<|eot|>"),
        is_repeated=True,
        between="<|start|>assistant",
        lead=" to=user<|message|>",
        drops=(
            " to=user<|message|>",
            "<|start|>assistant to=user<|message|>",
            "<|start|>assistant",
            "<|eom|>",
            "<|eot|>",
        ),
    ),
    "plamo3": ThoughtFormat(
        opens=("<|plamo:begin_think:plamo|>",), closes=("<|plamo:end_think:plamo|>",), is_implied=True
    ),
    "seed_oss": ThoughtFormat(opens=("<seed:think>",), closes=("</seed:think>",), is_implied=True),
    "minimax_m3": ThoughtFormat(opens=("<mm:think>",), closes=("</mm:think>",)),
    "k2_horizon": ThoughtFormat(
        opens=("<ifm|think>", "<ifm|think_fast>", "<ifm|think_faster>"),
        closes=("</ifm|think>", "</ifm|think_fast>", "</ifm|think_faster>"),
        yields=("<ifm|tool_calls>",),
    ),
    "granite": ThoughtFormat(
        opens=("Here is my thought process:", "Here's my thought process:"),
        closes=("Here is my response:", "Here's my response:"),
    ),
    # one pair of marks, <think> and </think>
    "qwen3": _THINKS_FIRST,
    "deepseek_r1": _THINKS_FIRST,
    "deepseek_v3": _THINK,
    "deepseek_v4": _THINKS_FIRST,
    "deepseek_v41": _THINKS_FIRST,
    "glm45": _THINKS_FIRST,
    "glm47": _THINKS_FIRST,
    "granite_thinking_parser": _THINKS_FIRST,
    "holo2": _THINKS_FIRST,
    "hy_v3": _THINK,
    "hy_v4": _THINKS_FIRST,
    "kimi_k2": replace(_THINKS_FIRST, yields=("<|tool_calls_section_begin|>",)),
    "ling3": _THINKS_FIRST,
    "mimo": _THINKS_FIRST,
    "minicpmv": _THINKS_FIRST,
    "minimax_m2": _THINKS_FIRST,
    "minimax_m2_append_think": replace(_THINKS_FIRST, is_kept=True),
    "nemotron_v3": _THINKS_FIRST,
    "olmo3": _THINKS_FIRST,
    "poolside_v1": _THINK,
    "step3": _THINKS_FIRST,
    "step3p5": _THINKS_FIRST,
    "hunyuan_a13b": ThoughtFormat(
        opens=("<think>\n", "<think>"),
        closes=("</think>", "</think>\n", "\n</think>", "\n</think>\n"),
        lead="\n<answer>\n",
        drops=("<answer>\n", "<answer>", "\n</answer>", "</answer>"),
    ),
    "ernie45": replace(_THINKS_FIRST, drops=("<response>\n", "<response>", "\n</response>\n", "\n</response>")),
    "mistral": ThoughtFormat(opens=("[THINK]", "<think>"), closes=("[/THINK]", "</think>")),
    # not in vLLM
    "solar_open": ThoughtFormat(
        opens=("<|think|>", "<|begin|>assistant<|think|>"),
        closes=("<|end|>",),
        is_repeated=True,
        between="<|begin|>assistant",
        lead="<|content|>",
        drops=("<|content|>", "<|begin|>assistant<|content|>", "<|begin|>assistant", "<|end|>"),
    ),
    "apriel": ThoughtFormat(
        opens=("Here are my reasoning steps:\n",),
        closes=("[BEGIN FINAL RESPONSE]", "[BEGIN FINAL RESPONSE]\n", "\n[BEGIN FINAL RESPONSE]\n"),
        lead="\n",
    ),
}
