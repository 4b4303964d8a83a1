"""Fields that other servers have and that would change the output, but are not served here: refused, never ignored."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from cluster.openai.errors import bad_field

_STRUCTURE: Final = "structured_outputs or response_format"

#: by name: the values that change nothing, and what is wanted instead of others. Of OpenAI's API, of vLLM's, and what
#: SGLang, TGI and llama.cpp have beside them
_UNSERVED: Final[dict[str, tuple[tuple[Any, ...], str]]] = {
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
    "do_sample": ((True,), "temperature"),
    "best_of": ((1,), "n"),
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


def check_unserved(name: str, raw: msgspec.Raw) -> None:
    """Check a field that the API does not have.

    Raises:
        RequestError: it is one that other servers have, with a value that would change the output.
    """
    if name not in _UNSERVED:
        return
    harmless, wanted = _UNSERVED[name]
    value = msgspec.json.decode(raw)
    if value is not None and value not in harmless:
        raise bad_field(name, value, f"{wanted}: {name} is not served")
