"""transformers' continuous batching as a contender: what `generate_batch` does, its manager and graphs made once."""

from __future__ import annotations

import logging
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.utils import WorkloadHints
from transformers.utils import logging as transformers_logging

from cluster.bench.bare.batch import Batch, Tokens, Workload
from cluster.bench.bare.machine import torch_threads
from cluster.bench.bare.ours import Model
from engine.model.drawn import draw_model
from engine.model.families import read_model_config
from messages.errors import WorkerError, first_line

_POLL_S: Final = 0.5
#: Of its cache, and of a step: its own defaults. Without a number of blocks it takes most of the memory there is, which
#: on a CPU is everybody's.
_CPU_BLOCK_TOKENS: Final = 256
_CPU_BATCH_TOKENS: Final = 8192


class TransformersEngine:
    """The same model as transformers has it, kept ready for one workload. Its own times of tokens count."""

    name = "transformers"

    def __init__(self, model: Model, workload: Workload, dtype: torch.dtype) -> None:
        """Take note of what to load, which happens when it is first asked."""
        self._named, self._dtype = model, dtype
        self._model: Any = None
        self._config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        self._hints = WorkloadHints(workload.input_len, workload.output_len, num_requests=workload.batch_size)
        of_each = -(-(workload.input_len + workload.output_len) // _CPU_BLOCK_TOKENS)
        self._sizes = (
            ContinuousBatchingConfig(
                num_blocks=2 * workload.batch_size * of_each + 2, max_batch_tokens=_CPU_BATCH_TOKENS
            )
            if model.device.type == "cpu"
            else None
        )

    def generate(self, prompts: Tokens, num_tokens: int) -> Batch:
        """Generate so many tokens, greedily, for each of the prompts, all there at once.

        Raises:
            WorkerError: the model cannot be loaded, or not all of them came.
        """
        with torch_threads(self._named.num_threads):
            results = self._results(prompts, num_tokens)
        faults = [str(result.error) for result in results if result.error]
        num_missing = len(prompts) - sum(len(result.generated_tokens) == num_tokens for result in results)
        if faults or num_missing:
            seen = faults[0][:200] if faults else f"{num_missing} of {len(prompts)} sequences lack tokens"
            raise WorkerError(f"transformers failed: {seen}")
        return Batch(
            begun_s=min(result.created_time for result in results),
            token_times_s=[list(result.timestamps) for result in results],
            outputs=[list(result.generated_tokens) for result in results],
        )

    def close(self) -> None:
        """Give its memory back."""
        if self._model is not None:
            self._model.destroy_cached_continuous_batching_manager()
            self._model = None

    def _results(self, prompts: Tokens, num_tokens: int) -> list[Any]:
        """Return transformers' results, those that came; raises as `generate` does."""
        try:
            self._model = self._model or self._loaded()
            with self._model.continuous_batching_context_manager(
                self._config,
                continuous_batching_config=self._sizes,
                persistent_manager=True,
                workload_hints=self._hints,
            ) as manager:
                try:
                    _asked(manager, prompts[:1], 1)  # its thread first cleans up what it keeps: that is not measured
                    return _asked(manager, prompts, num_tokens)
                except BaseException:  # of Ctrl-C too: its thread would first generate all that was asked for
                    manager.stop(hard_stop=True)
                    raise
        except Exception as error:  # of another project's code anything may come
            raise WorkerError(f"transformers failed: {first_line(error)}") from error

    def _loaded(self) -> Any:
        """Load or draw the model: the same weights as ours, its own linears and attention."""
        transformers_logging.set_verbosity_error()
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)  # what it says of managers that are kept
        named = self._named
        if named.drawn_seed is not None:
            model: Any = draw_model(read_model_config(named.path), self._dtype, named.device, named.drawn_seed)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                named.path, dtype=self._dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
            ).to(named.device)
        model.set_attn_implementation("sdpa")
        return model.eval()


def _asked(manager: Any, prompts: Tokens, num_tokens: int) -> list[Any]:
    """Return transformers' results, those that came, in the order of the prompts."""
    order = manager.add_requests(prompts, max_new_tokens=num_tokens, record_timestamps=True)
    done: dict[str, Any] = {}
    while len(done) < len(order):
        result = manager.get_result(timeout=_POLL_S)
        if result is not None and result.is_finished():
            done[result.request_id] = result
        elif result is None and not manager.is_running():
            break
    return [done[request_id] for request_id in order if request_id in done]
