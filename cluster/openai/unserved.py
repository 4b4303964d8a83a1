"""Fields that other servers have and that would change the output, but are not served here: refused, never ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeAlias

import msgspec

from cluster.openai.errors import bad_field

_STRUCTURE: Final = "structured_outputs or response_format"

#: by name: the values that change nothing, and what is wanted instead of others
Unserved: TypeAlias = Mapping[str, tuple[tuple[Any, ...], str]]

#: of OpenAI's API, of vLLM's, and what SGLang, TGI and llama.cpp have beside them
_UNSERVED: Final[Unserved] = {
    "functions": (([],), "tools"),
    "function_call": (("none", "auto"), "tool_choice"),
    "audio": ((), "text alone"),
    "prediction": ((), "no prediction"),
    "web_search_options": ((), "no search"),
    "bad_words": (([],), "logit_bias"),
    "allowed_token_ids": ((), "logit_bias or structured_outputs"),
    "logits_processors": (([],), "no processor"),
    "structural_tag": ((), _STRUCTURE),
    "guided_decoding_backend": (("auto", "guidance"), "auto"),
    "use_beam_search": ((False,), "false"),
    "length_penalty": ((1, 0), "1, for there are no beams"),
    "early_stopping": ((False,), "false, for there are no beams"),
    "echo": ((False,), "false"),
    "documents": (([],), "documents in messages"),
    "prompt_embeds": ((), "a prompt of text or token ids"),
    "logprob_token_ids": (([],), "top_logprobs"),
    "vllm_xargs": (({},), "no extra arguments"),
    "lora_request": ((), "a model by its name"),
    "json_schema": ((), _STRUCTURE),
    "regex": ((), _STRUCTURE),
    "ebnf": ((), _STRUCTURE),
    "grammar": ((), _STRUCTURE),
    "custom_logit_processor": ((), "no processor"),
    "thinking_token_budget": ((-1,), "max_tokens or reasoning_effort"),
    "thinking_budget": ((-1,), "max_tokens or reasoning_effort"),
    "enable_thinking": ((), "chat_template_kwargs"),
    "thinking": ((), "chat_template_kwargs"),
    "separate_reasoning": ((True,), "include_reasoning"),
    "watermarking": ((False,), "false"),
    "watermark": ((False,), "false"),
    "truncation_side": (("left",), "left"),
    "return_prompt_text": ((False,), "/tokenize and /detokenize, which show the prompt"),
    "repetition_detection": ((), "repetition_penalty"),
    "kv_transfer_params": (({},), "no value: prefill and decode find each other here"),
    "ec_transfer_params": (({},), "no value: there are no encoders"),
    "media_io_kwargs": (({},), "text alone"),
    "mm_processor_kwargs": (({},), "text alone"),
    "stop_regex": (([], ""), "stop"),
    "no_stop_trim": ((False,), "include_stop_str_in_output"),
    "lora_path": ((), "a model by its name"),
    "custom_params": (({},), "no parameters of a processor"),
    "return_hidden_states": ((False,), "false"),
    "max_new_tokens": ((), "max_tokens"),
    "min_new_tokens": ((0,), "min_tokens"),
    "n_predict": ((-1,), "max_tokens"),
    "num_predict": ((-1,), "max_tokens"),
    "max_length": ((), "max_tokens"),
    "do_sample": ((True,), "temperature"),
    "best_of": ((1,), "n"),
    "num_return_sequences": ((1,), "n"),
    "num_beams": ((1,), "1, for there are no beams"),
    "random_seed": ((), "seed"),
    "stop_sequences": (([],), "stop"),
    "safe_prompt": ((False,), "false"),
    "session_params": (({},), "previous_response_id, or all messages"),
    "input_ids": ((), "a prompt of token ids"),
    "adapter_id": ((), "a model by its name"),
    "lora": (([],), "a model by its name"),
    "no_repeat_ngram_size": ((0,), "repetition_penalty"),
    "guidance_scale": ((1,), "1"),
    "negative_prompt": (("",), "no negative prompt"),
    "penalty_alpha": ((0,), "top_p or min_p"),
    "repeat_penalty": ((1,), "repetition_penalty"),
    "n_probs": ((0,), "logprobs"),
    "typical_p": ((1, 0), "top_p or min_p"),
    "tfs_z": ((1, 0), "top_p or min_p"),
    "top_a": ((0,), "top_p or min_p"),
    "top_n_sigma": ((-1, 0), "top_p or min_p"),
    "mirostat": ((0,), "top_p or min_p"),
    "dynatemp_range": ((0,), "temperature"),
    "xtc_probability": ((0,), "top_p or min_p"),
    "dry_multiplier": ((0,), "frequency_penalty or presence_penalty"),
}

#: what chats have and texts are completed without
OF_CHATS: Final[Unserved] = {
    "tools": (([],), "/v1/chat/completions"),
    "max_completion_tokens": ((), "max_tokens"),
    "top_logprobs": ((0,), "logprobs, a number"),
}
#: what chats and completions have and /v1/responses says otherwise, or has not
NOT_OF_RESPONSES: Final[Unserved] = {
    "max_tokens": ((), "max_output_tokens"),
    "max_completion_tokens": ((), "max_output_tokens"),
    "n": ((1,), "1"),
    "logprobs": ((False,), 'include: ["message.output_text.logprobs"]'),
    "prompt_logprobs": ((), "no value"),
    "response_format": (({"type": "text"},), "text.format"),
    **dict.fromkeys(
        ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"), ((), "text.format")
    ),
    "reasoning_effort": ((), "reasoning.effort"),
    "include_reasoning": ((True,), "true"),
    "include_stop_str_in_output": ((False,), "false"),
    "truncate_prompt_tokens": ((), "no value: what does not fit is refused, not cut"),
    "chat_template": ((), "the model's own"),
    "add_generation_prompt": ((True,), "true"),
    "continue_final_message": ((False,), "false"),
    "previous_input_messages": (([],), "input"),
    "enable_response_messages": ((False,), "false"),
    "return_token_ids": ((False,), "false"),
}


def check_unserved(name: str, raw: msgspec.Raw, others: Unserved) -> None:
    """Check a field that a request does not have. `others`: of other requests than this.

    Raises:
        RequestError: it is one that other servers, or other requests, have, with a value that would change the output.
    """
    entry = _UNSERVED.get(name) or others.get(name)
    if entry is None:
        return
    harmless, wanted = entry
    value = msgspec.json.decode(raw)
    if value is not None and value not in harmless:
        raise bad_field(name, value, f"{wanted}: {name} is not served")
