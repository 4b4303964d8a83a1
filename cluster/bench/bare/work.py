"""How many bytes a model's tokens move at least, and how many operations they take. Pure, but for `weights_of`.

Bytes of a step: every weight once, but of an embedding that only looks up nothing, and of a mixture of experts those
that the step's tokens choose if they choose evenly; of each decode row the keys and values that it sees. Operations of
a token: two for each weight that it is multiplied with, and for each key that it sees two for each number of its query
and of the value, in every head of every layer. Logits are computed for tokens that a token is sampled after.
Activations, norms, softmax and what is written count as nothing: what is told is a bound, and shares are of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.kernels.protocol import LayerUse


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Numbers of a model's weights, by what is done with them."""

    body: int  #: matrices that every token is multiplied with
    experts: int  #: a token is multiplied with those of the experts that it chooses
    head: int  #: a token that is sampled after is multiplied with them
    chosen_share: float  #: of the experts, by one token
    vectors: int  #: of norms and the like, and biases
    total: int  #: with those that only look up

    def read(self, num_tokens: int) -> float:
        """Return how many a step of so many tokens reads."""
        touched = 1.0 - (1.0 - self.chosen_share) ** num_tokens
        return self.body + self.vectors + self.head + self.experts * touched


@dataclass(frozen=True, slots=True)
class Effort:
    """What something takes at least."""

    num_bytes: float  #: moved
    num_flops: float  #: multiplications and additions

    def bound_s(self, bytes_per_s: float, flops_per_s: float) -> float:
        """Return the seconds that it takes a device of these rates at least: of the two, whichever is longer."""
        return max(self.num_bytes / bytes_per_s, self.num_flops / flops_per_s)


class ModelWork:
    """Counts the effort of a model's steps."""

    def __init__(self, weights: Weights, layers: Sequence[LayerUse], item_bytes: int, kv_item_bytes: int) -> None:
        """Count for `layers`: a number of the weights has `item_bytes`, one of KV `kv_item_bytes`."""
        self.weights = weights
        self.item_bytes = item_bytes
        self.kv_item_bytes = kv_item_bytes
        self._layers = layers

    def prefill(self, batch_size: int, input_len: int) -> Effort:
        """Return the effort of whole prompts, in as few steps as can be, with one token sampled after each."""
        num_tokens = batch_size * input_len
        _, attention_flops = self._attention(np.arange(input_len))
        return Effort(
            self.weights.read(num_tokens) * self.item_bytes,
            self._linear_flops(num_tokens, batch_size) + batch_size * attention_flops,
        )

    def decode(self, positions: Iterable[int], num_steps: int) -> Effort:
        """Return the effort of decode rows at these positions of their sequences, spread evenly over the steps."""
        rows = np.fromiter(positions, np.int64)
        kv_bytes, attention_flops = self._attention(rows)
        weights = num_steps * self.weights.read(max(1, round(len(rows) / num_steps)))
        return Effort(weights * self.item_bytes + kv_bytes, self._linear_flops(len(rows), len(rows)) + attention_flops)

    def _linear_flops(self, num_tokens: int, num_sampled: int) -> float:
        weights = self.weights
        return 2.0 * (num_tokens * (weights.body + weights.experts * weights.chosen_share) + num_sampled * weights.head)

    def _attention(self, positions: npt.NDArray[np.int64]) -> tuple[float, float]:
        """Return the bytes that rows at these positions read if each reads its own keys, and their operations."""
        num_bytes = num_flops = 0.0
        for layer in self._layers:
            seen = positions + 1
            if layer.window is not None:
                seen = np.minimum(seen, layer.window)
            if layer.chunk is not None:
                seen = np.minimum(seen, positions % layer.chunk + 1)
            num_keys = float(seen.sum())
            num_bytes += num_keys * layer.spec.token_elements * self.kv_item_bytes
            num_flops += num_keys * 2 * layer.num_heads * (layer.spec.k_dim + layer.spec.v_dim)
        return num_bytes, num_flops


def weights_of(config: Any) -> Weights:
    """Count the weights of transformers' model of that configuration, which is made without any memory for them."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager", trust_remote_code=False)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    vectors = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.dim() < 2 and ".experts." not in name
    )
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    total = sum(sizes.values())
    text = config.get_text_config()
    num_experts = next((found for name in _NUMBERS_OF_EXPERTS if (found := getattr(text, name, None))), 1)
    chosen = getattr(text, "num_experts_per_tok", None) or num_experts
    return Weights(
        body=total - experts - vectors - head.numel() - (0 if table is head else table.numel()),
        experts=experts,
        head=head.numel(),
        chosen_share=chosen / num_experts,
        vectors=vectors,
        total=total,
    )


#: What families call how many experts a layer has.
_NUMBERS_OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
