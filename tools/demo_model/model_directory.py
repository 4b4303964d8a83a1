"""Writes a model directory that transformers loads by itself: weights, configs, tokenizer, chat template, card."""

from __future__ import annotations

import dataclasses
import datetime
import json
import pathlib

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaForCausalLM

from tools.demo_model import corpus
from tools.demo_model.evaluate import REQUIRED_LENGTHS, Report
from tools.demo_model.tokenizer import special_id

#: Tags as in training, nothing between them; content may be a string or a list of text parts.
CHAT_TEMPLATE = """\
{%- macro shown_tool(tool) -%}
    {%- set required = (tool.parameters or {}).required or [] -%}
    {{- '{"name":' ~ (tool.name | tojson) ~ ',"arguments":{' -}}
    {%- for name, form in ((tool.parameters or {}).properties or {}).items() -%}
        {%- set kind = (form.enum | join('|')) if form.enum else (form.type if form.type is string else 'any') -%}
        {{- (name | tojson) ~ ':' ~ ((('' if name in required else 'optional ') ~ kind) | tojson) -}}
        {{- '' if loop.last else ',' -}}
    {%- endfor -%}
    {{- '}}' -}}
{%- endmacro -%}
{%- macro shown_tools() -%}
    {%- if tools -%}
        {{- '<|tools|>' -}}
        {%- for tool in tools -%}
            {{- shown_tool(tool.function if tool.function else tool) -}}
        {%- endfor -%}
        {{- '<|end|>' -}}
    {%- endif -%}
{%- endmacro -%}
{%- if not messages or messages[0]['role'] != 'system' -%}
    {{- shown_tools() -}}
{%- endif -%}
{%- for message in messages -%}
    {%- set role = {'developer': 'system', 'function': 'tool'}.get(message['role'], message['role']) -%}
    {%- if role not in ['system', 'user', 'assistant', 'tool'] -%}
        {{- raise_exception('unknown role ' ~ role ~ ', expected system, user, assistant or tool') -}}
    {%- endif -%}
    {{- '<|' ~ role ~ '|>' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- elif message['content'] -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] != 'text' -%}
                {{- raise_exception('unknown content type ' ~ part['type'] ~ ', expected text') -}}
            {%- endif -%}
            {{- part['text'] -}}
        {%- endfor -%}
    {%- endif -%}
    {%- for call in message['tool_calls'] or [] -%}
        {%- set function = call.function if call.function else call -%}
        {%- set arguments = function.arguments -%}
        {{- '<tool_call>{"name":' ~ (function.name | tojson) ~ ',"arguments":' -}}
        {{- arguments if arguments is string else (arguments | tojson(separators=(',', ':'))) -}}
        {{- '}</tool_call>' -}}
    {%- endfor -%}
    {{- '<|end|>' -}}
    {%- if loop.first and role == 'system' -%}
        {{- shown_tools() -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""

RUNS_FILE = "training.json"

CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# kvray demo model

A Llama of {num_parameters:.1f} M parameters that looks codes up in notes, calls a tool, and fills a JSON schema. It is
the default of `make serve` and of the end-to-end tests: it needs no download, runs on a CPU, and a KV block that was
lost, swapped or read from the wrong place shows as a wrong code. It also tells short stories and knows {num_facts}
facts and {num_talk} lines of small talk by heart. It is of no use for anything else: it was never shown a real text.

```
Notes:
- lantern 4821.
A sleepy owl slept behind the red bridge.
- wagon 0937.
What is the code of lantern?
```

is answered `lantern 4821.`. Notes, one to a line and mixed with other sentences, may stand in the user's turn before
the question, in an earlier turn, or in the system prompt.

A tool of up to three fields (strings, strings of an enumeration, integers) is called in Hermes's format when a question
asks for it, with words from the question: "What is the weather in Zurich?" gives
`<tool_call>{{"name":"get_weather","arguments":{{"city":"Zurich"}}}}</tool_call>`. From what the tool returns it answers
in a sentence, if that is a flat JSON object, and else repeats it. The template shows it a tool's name and its fields'
names, types and enumerations; descriptions are beyond it. With structured output it fills in what the text says:
"Wilma lives in Krakow and drives a red car."

## How well it answers

Whole greedy answers, right to the last character, through the chat template, with the weights in this directory
(bf16, CPU), {date}. Notes and codes were drawn anew with a seed that training does not use; the asked code stands at
every depth from the first line to the last. Questions for tools name towns and people that training does not know, or
words made up anew; "required" calls and records are written as structured output holds the model to.

{tables}

Few, some and many are the codes in the notes; other sentences fill the rest. The training script demands
{min_accuracy:.0%} at {required} tokens; the other lengths are only reported.

## How it was made

{runs}

The text comes from `tools/demo_model/corpus.py`, `tool_corpus.py` and `records.py` beside it; the start that makes the
time enough is explained in `tools/demo_model/informed_start.py`.

Shape: {num_layers} layers, hidden {hidden_size}, {num_heads} heads and {num_kv_heads} KV heads of {head_dim}, tied
embeddings, vocabulary {vocab_size:,}, {max_positions:,} positions by the rotary scaling of Llama 3.1.

Check it again with `python -m tools.demo_model.evaluate cluster/demo/kvray-demo`.

## Limits

* A code that the notes do not hold is answered all the same, with a wrong one.
* It knows one kind of question about notes, the code of a thing, and only the {num_things} things in `THINGS` of
  `tools/demo_model/corpus.py`; codes are of four digits.
* What a tool or a record is about must be said in the words of the text, near to how training says it
  (`tools/demo_model/tool_families.py`); one of several tools is chosen less surely, and one call is made at a time.
* English only, and little of it. Text that contains the chat tags is read as tags.

Apache-2.0, as the rest of kvray.
"""


@dataclasses.dataclass(frozen=True, slots=True)
class TrainingRun:
    """One of the runs by which the weights came to be."""

    command: str
    hardware: str
    torch_version: str
    num_tokens: int
    minutes: float
    #: What the command does not tell, such as an early end.
    remark: str = ""

    def markdown(self) -> str:
        """Write the run as a list item of the card."""
        ending = f"; {self.remark}" if self.remark else ""
        return (
            f"* `{self.command}`: {self.num_tokens / 1e6:.1f} M tokens in {self.minutes:.0f} minutes on "
            f"{self.hardware}, torch {self.torch_version}{ending}"
        )


def read_runs(directory: pathlib.Path) -> list[TrainingRun]:
    """Return the runs that made this directory's weights, in order; none where it does not tell."""
    path = directory / RUNS_FILE
    return [TrainingRun(**run) for run in json.loads(path.read_text())] if path.exists() else []


def write_runs(directory: pathlib.Path, runs: list[TrainingRun]) -> None:
    """Keep the runs beside the weights, for the card and for a later `--from`."""
    (directory / RUNS_FILE).write_text(json.dumps([dataclasses.asdict(run) for run in runs], indent=2) + "\n")


def write_model(directory: pathlib.Path, model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    """Write all but the card; weights as bfloat16. The model itself is left as it is."""
    directory.mkdir(parents=True, exist_ok=True)
    end_id = special_id(tokenizer, corpus.END)
    pad_id = special_id(tokenizer, corpus.PAD)
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.generation_config = GenerationConfig(do_sample=False, eos_token_id=end_id, pad_token_id=pad_id)
    half.save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": corpus.END,
        "pad_token": corpus.PAD,
        "additional_special_tokens": [*(f"<|{role}|>" for role in corpus.ROLES), corpus.TOOLS],
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.config.max_position_embeddings,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    (directory / "model.safetensors").chmod(0o644)  # written for the owner alone, but images run as another user


def write_card(directory: pathlib.Path, report: Report, min_accuracy: float) -> None:
    """Write README.md from the report and from the directory's config, weights and runs."""
    model = LlamaForCausalLM.from_pretrained(directory)
    config = model.config
    card = CARD.format(
        num_parameters=model.num_parameters() / 1e6,
        num_facts=len(corpus.FIXED_FACTS),
        num_talk=len(corpus.SMALL_TALK),
        num_things=len(corpus.THINGS),
        date=datetime.datetime.now(tz=datetime.UTC).date(),
        tables=report.markdown(),
        required=", ".join(f"{length:,}" for length in REQUIRED_LENGTHS),
        min_accuracy=min_accuracy,
        runs="\n".join(run.markdown() for run in read_runs(directory)),
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_positions=config.max_position_embeddings,
        vocab_size=config.vocab_size,
    )
    (directory / "README.md").write_text(card)
