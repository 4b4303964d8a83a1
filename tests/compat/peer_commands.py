"""Tools that measure and evaluate other people's servers: what they are run with, and whether a run went well."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

_NUM_REQUESTS = 6
_TASK = """\
task: made_up
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "Question: {{{{question}}}} Answer:"
doc_to_target: {target}
{more}
"""


@dataclass(frozen=True, slots=True)
class Peer:
    """A tool, in an environment of its own, which has the name of its package."""

    name: str
    package: str


PEERS = (Peer("guidellm", "guidellm"), Peer("aiperf", "aiperf"), Peer("lm-eval", "lm-eval"))


def commands(peer: Peer, environment: Path, url: str, model: Path, folder: Path) -> dict[str, list[str]]:
    """The commands of a tool, by what they show; each ends with 0 where no request failed.

    `url`: of the server, without a path; `model`: its directory, whose name it is served by; `folder`: for files.
    """
    bin_ = environment / "bin"
    if peer.name == "guidellm":
        return {
            kind: [
                *(str(bin_ / "guidellm"), "run", "--disable-progress", "--profile", "kind=concurrent,streams=2"),
                *("--backend", f"kind=openai_http,target={url},model={model.name},request_format=/v1/{kind}"),
                *("--tokenizer", f"kind=hf_auto,model={model}"),
                *("--data", "kind=synthetic_text,prompt_tokens=40,output_tokens=8"),
                *(
                    "--constraint",
                    f"kind=max_requests,count={_NUM_REQUESTS}",
                    "--constraint",
                    "kind=max_errors,count=1",
                ),
                *("--output", f"kind=json,path={folder / f'guidellm-{kind}.json'}"),
            ]
            for kind in ("chat/completions", "completions")
        }
    if peer.name == "aiperf":
        return {
            kind: [
                *(str(bin_ / "aiperf"), "profile", "--model", model.name, "--url", url, "--endpoint-type", kind),
                *("--tokenizer", str(model), "--streaming", "--ui-type", "none", "--concurrency", "2"),
                *("--request-count", str(_NUM_REQUESTS), "--isl", "40", "--osl", "8"),
                *("--output-artifact-dir", str(folder / f"aiperf-{kind}")),
            ]
            for kind in ("chat", "completions", "responses")
        }
    data = folder / "questions.json"
    data.write_text(
        json.dumps([{"question": f"What is {n}?", "answers": [str(n), "none"], "best": 0} for n in range(4)])
    )
    for name, kind, target, more in (
        ("ranked", "multiple_choice", "best", 'doc_to_choice: "{{answers}}"'),
        ("written", "generate_until", '"{{answers[0]}}"', 'generation_kwargs: {until: ["?"], max_gen_toks: 8}'),
    ):
        task = _TASK.format(data=data, kind=kind, target=target, more=more).replace("made_up", name)
        (folder / f"{name}.yaml").write_text(task)
    return {
        f"{task}, {path}": [
            *(str(bin_ / "lm_eval"), "run", "--model", client, "--tasks", task, "--include_path", str(folder)),
            *("--model_args", f"model={model.name},base_url={url}/v1/{path},num_concurrent=2,max_retries=1{more}"),
            *(["--apply_chat_template"] if path == "chat/completions" else []),
        ]
        for task, path, client, more in (
            ("ranked", "completions", "local-completions", f",tokenizer={model}"),
            ("written", "completions", "local-completions", ",tokenizer_backend=remote"),
            ("written", "chat/completions", "local-chat-completions", ""),
        )
    }
