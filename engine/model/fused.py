"""A model's RMS norms, gated MLPs and attention layers on operators of our own: fewer passes over memory, same numbers.

Transformers computes these in several operators, each reading and writing all of its tensors. `fuse_modules` gives
single *instances* of them another `forward`; classes and module trees stay as they are. An instance is fused only after
its own arithmetic was reproduced on trial input: the same operations in the same order (bit for bit), and our operator
within a rounding of them. Whatever differs, in whichever way, keeps its own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from engine.kernels.protocol import LayerOperators
from engine.model.attention import ATTENTION_NAME
from engine.model.linear import MergedLinear, can_merge

PROBE_NAME = "kvray_fuse_probe"
TRIAL_ROWS = 5

#: What the forward of a module that is not what it looks like can raise.
MODULE_ERRORS = (TypeError, RuntimeError, ValueError, LookupError, AttributeError, AssertionError)

#: Share of bfloat16 or float16 results that may differ by a rounding; the wrong order of them differs in 15 % and more.
_MAX_ROUNDED = 0.02


@dataclass(frozen=True, slots=True)
class FusedModules:
    """How many instances of each kind were fused."""

    norms: int
    gates: int
    attentions: int

    @property
    def name(self) -> str:
        """What the kernel path says of them."""
        return f"fused-{self.norms}-{self.gates}-{self.attentions}"


def fuse_modules(model: nn.Module, operators: LayerOperators) -> FusedModules:
    """Fuse what can be fused of a loaded model, in place. Call it after linears were packed.

    The model's attention implementation is left as it was.
    """
    with torch.inference_mode():
        modules = list(model.modules())
        norms = sum(_fuse_norm(module, operators) for module in modules)
        gates = sum(_fuse_gate(module, operators) for module in modules)
        attentions = sum(_fuse_attention(call, operators) for call in _attention_calls(model))
    return FusedModules(norms, gates, attentions)


def agree(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Tell whether both are equal but for the last bits of float32, or the rounding of a few results of less."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    if got.dtype == torch.float32:
        return torch.allclose(got, want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))
    step = torch.finfo(want.dtype).eps
    is_near = torch.allclose(got.float(), want.float(), rtol=2 * step, atol=step * float(want.float().abs().mean()))
    return is_near and float((got != want).float().mean()) <= _MAX_ROUNDED


def _trial(*shape: int, like: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Draw numbers of the dtype and on the device of `like`."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(like)


# --------------------------------------------------------------------------------------------------------------- norms


class FusedNorm:
    """Stands for an RMS norm's forward."""

    def __init__(
        self,
        norm: nn.Module,
        weight: torch.Tensor,
        operators: LayerOperators,
        *,
        eps: float,
        adds_one: bool,
        rounds_first: bool,
    ) -> None:
        self._forward = norm.forward
        self._weight = weight.detach()
        self._operators = operators
        self._eps = eps
        self._adds_one = adds_one
        self._rounds_first = rounds_first

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Compute what the norm's own forward computes."""
        if hidden_states.dtype != self._weight.dtype:
            result: torch.Tensor = self._forward(hidden_states)
            return result
        return self._operators.rms_norm(
            hidden_states.contiguous(),
            self._weight,
            self._eps,
            adds_one=self._adds_one,
            rounds_first=self._rounds_first,
        )

    def of_sum(self, residual: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """Compute the norm of `residual + delta`, which is left in `delta`; both `[..., n]` of the weight's dtype."""
        return self._operators.add_rms_norm(
            residual.contiguous(),
            delta,
            self._weight,
            self._eps,
            adds_one=self._adds_one,
            rounds_first=self._rounds_first,
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that our operator serves; inputs of another go to the module's own forward."""
        return self._weight.dtype


def _fuse_norm(norm: nn.Module, operators: LayerOperators) -> bool:
    weight = getattr(norm, "weight", None)
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1 or not isinstance(eps, float):
        return False
    if "Norm" not in type(norm).__name__ or len(list(norm.parameters())) != 1 or not operators.serves(weight):
        return False
    size = weight.shape[0]
    # Rows of ordinary and of tiny size: eps must be where it belongs.
    rows = _trial(TRIAL_ROWS, 64, size, like=weight)
    rows = rows * torch.tensor([30.0, 1.0, 0.1, 1e-2, 1e-3]).to(weight)[:, None, None]
    try:
        want = norm(rows)
    except MODULE_ERRORS:
        return False
    for adds_one, rounds_first in ((False, True), (False, False), (True, False)):
        fused = FusedNorm(norm, weight, operators, eps=eps, adds_one=adds_one, rounds_first=rounds_first)
        if agree(fused(rows), want):
            norm.forward = fused
            return True
    return False


# --------------------------------------------------------------------------------------------------------------- gates


class FusedGate:
    """Stands for a gated MLP's forward: `down(activation(gate(x)) * up(x))`."""

    def __init__(self, mlp: Any, operators: LayerOperators, is_gelu: bool) -> None:
        self._gate, self._up, self._down = _forwards(mlp)
        opening: list[object] = [mlp.gate_proj, mlp.up_proj]
        self._merged = MergedLinear(opening) if can_merge(opening) else None
        self._operators = operators
        self._is_gelu = is_gelu

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Compute what the MLP's own forward computes."""
        if self._merged is not None:
            return self._down(self._merged.gated(x, is_gelu=self._is_gelu))
        return self._down(self._operators.gate(self._gate(x), self._up(x), is_gelu=self._is_gelu))


def _forwards(mlp: Any) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    return [mlp.gate_proj.forward, mlp.up_proj.forward, mlp.down_proj.forward]


def _fuse_gate(mlp: nn.Module, operators: LayerOperators) -> bool:
    children = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    activation = getattr(mlp, "act_fn", None)
    if not all(isinstance(child, nn.Module) and hasattr(child, "in_features") for child in children):
        return False
    gate, up, down = children
    weight = getattr(gate, "weight", None)
    if not callable(activation) or not isinstance(weight, torch.Tensor) or not operators.serves(weight):
        return False
    rows = _trial(TRIAL_ROWS, gate.in_features, like=weight)  # type: ignore[union-attr]
    try:
        opened, raised = gate(rows), up(rows)  # type: ignore[misc]
        if not torch.equal(mlp(rows), down(activation(opened) * raised)):  # type: ignore[misc]
            return False
        opened, raised = _trial(64, 256, like=weight), _trial(64, 256, like=weight, seed=1)
        trials = [(x, y, activation(x) * y) for x, y in ((opened, raised), (opened.float(), raised.float()))]
    except MODULE_ERRORS:
        return False
    for is_gelu in (False, True):
        # In float32 too: bfloat16 alone does not tell gelu's two forms apart.
        if all(agree(operators.gate(x.clone(), y, is_gelu=is_gelu), want) for x, y, want in trials):
            mlp.forward = FusedGate(mlp, operators, is_gelu)
            return True
    return False


# ---------------------------------------------------------------------------------------------------------- attentions


@dataclass(frozen=True, slots=True)
class _AttentionCall:
    """How an attention layer was called in a forward of its model, and how it called the attention function."""

    module: nn.Module
    keywords: dict[str, Any]
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    options: dict[str, Any]
    result: torch.Tensor


def probe_result(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Make up what a probe answers in place of attention: `[1, T, num_heads, v_dim]`."""
    return _trial(query.shape[0], query.shape[2], query.shape[1], value.shape[3], like=query, seed=2)


Probe: TypeAlias = Callable[..., tuple[torch.Tensor, None]]
Hook: TypeAlias = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]


def run_trial(model: nn.Module, modules: Iterable[nn.Module], probe: Probe, after: Hook) -> bool:
    """Run one forward of a few tokens through the model as it is, with `probe` for attention.

    `after` is told each call of `modules`: the module, its positional and keyword arguments, its output. The answer is
    whether the forward ran; the model is as it was before.
    """
    config: Any = model.config
    before = config._attn_implementation  # noqa: SLF001  # transformers offers no other way to ask
    AttentionInterface.register(PROBE_NAME, probe)
    hooks = [module.register_forward_hook(after, with_kwargs=True) for module in modules]
    tokens = torch.arange(TRIAL_ROWS, device=next(model.parameters()).device)[None]
    try:
        model.set_attn_implementation(PROBE_NAME)  # type: ignore[operator]
        model(input_ids=tokens, position_ids=tokens * 7, use_cache=False)
    except MODULE_ERRORS:
        return False
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(before)  # type: ignore[operator]
    return True


def _attention_calls(model: nn.Module) -> Iterator[_AttentionCall]:
    """Yield what each attention module of `model` got and gave in a trial; nothing where the trial fails."""
    asked: dict[nn.Module, tuple[Any, ...]] = {}
    calls: list[_AttentionCall] = []

    def probe(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any = None, **options: Any
    ) -> tuple[torch.Tensor, None]:
        asked[module] = (query.clone(), key.clone(), value.clone(), {"attention_mask": mask, **options})
        return probe_result(query, value), None

    def after(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        if not args and module in asked:
            query, key, value, options = asked.pop(module)
            calls.append(_AttentionCall(module, keywords, query, key, value, options, output[0]))

    modules = [module for module in model.modules() if hasattr(module, "q_proj")]
    return iter(calls if run_trial(model, modules, probe, after) else ())


class FusedAttention:
    """Stands for an attention layer's forward: projections, norms of q and k where it has them, rotary embedding."""

    def __init__(self, module: Any, operators: LayerOperators, options: dict[str, Any]) -> None:
        self._module = module
        self._forward = module.forward
        self._operators = operators
        self._options = options
        # forward, not the module: no hooks are on them, and the way through a module's call takes longer than a norm
        projections = [module.q_proj, module.k_proj, module.v_proj]
        self._projections = [projection.forward for projection in projections]
        self._merged = MergedLinear(projections) if can_merge(projections) else None
        self._output = module.o_proj.forward
        self._query_norm = getattr(module, "q_norm", None)
        self._key_norm = getattr(module, "k_norm", None)

    def __call__(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        *,
        kept_rows: torch.Tensor | None = None,
        **keywords: Any,
    ) -> Any:
        """Compute what the layer's own forward computes; with `kept_rows [r]`, `[1, r, n]` of these rows alone."""
        module = self._module
        name: str = module.config._attn_implementation  # noqa: SLF001  # as the layer itself asks
        is_ours = past_key_values is None and hidden_states.shape[0] == 1
        # "eager" is no name of the registry: it is each module's own
        if position_embeddings is None or not is_ours or name not in ALL_ATTENTION_FUNCTIONS:
            out, weights = self._forward(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **keywords,
            )
            return (out if kept_rows is None else out[:, kept_rows]), weights
        heads = (*hidden_states.shape[:-1], -1, module.head_dim)  # [1, T, num_heads, head_dim]
        if self._merged is not None:
            projected = self._merged(hidden_states)
        else:
            projected = tuple(projection(hidden_states) for projection in self._projections)
        query, key, value = (rows.view(heads) for rows in projected)
        if self._query_norm is not None:
            query = self._query_norm(query)
        if self._key_norm is not None:
            key = self._key_norm(key)
        cosine, sine = position_embeddings
        # ours alone stores KV: it may be rotated on the way there
        write = self._operators.rotating_write(cosine, sine) if name == ATTENTION_NAME else None
        if write is not None:
            keywords["pool_write"] = write
        else:
            self._operators.rotate(query[0], cosine, sine)
            self._operators.rotate(key[0], cosine, sine)
        out, _ = ALL_ATTENTION_FUNCTIONS[name](
            module,
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attention_mask,
            **keywords,
            **self._options,
        )
        rows = out.reshape(*hidden_states.shape[:-1], -1)
        return self._output(rows if kept_rows is None else rows[:, kept_rows]), None


def _fuse_attention(call: _AttentionCall, operators: LayerOperators) -> bool:
    module: Any = call.module
    if not all(hasattr(module, name) for name in ("k_proj", "v_proj", "o_proj", "head_dim", "layer_idx", "config")):
        return False
    given = {*call.keywords, "attention_mask"}  # what the layer passed on; the rest it knows itself
    options = {name: value for name, value in call.options.items() if name not in given}
    fused = FusedAttention(module, operators, options)
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]] = []

    def probe(
        _: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any = None, **got: Any
    ) -> tuple[torch.Tensor, None]:
        seen.append((query, key, value, {"attention_mask": mask, **got}))
        return probe_result(query, value), None

    AttentionInterface.register(PROBE_NAME, probe)
    before = module.config._attn_implementation  # noqa: SLF001
    module.config._attn_implementation = PROBE_NAME  # noqa: SLF001
    try:
        result = fused(**call.keywords)[0]
    except MODULE_ERRORS:
        return False
    finally:
        module.config._attn_implementation = before  # noqa: SLF001
    if len(seen) != 1:
        return False
    query, key, value, got_options = seen[0]
    is_same = (
        _same_options(got_options, call.options)
        and torch.equal(value, call.value)
        and agree(query, call.query)
        and agree(key, call.key)
        and torch.equal(result, call.result)
    )
    if is_same:
        module.forward = fused
    return is_same


def _same_options(got: dict[str, Any], want: dict[str, Any]) -> bool:
    """Tell whether both have the same names with the same objects, or equal values where they are no tensors."""
    return got.keys() == want.keys() and all(
        got[name] is value or (not isinstance(value, torch.Tensor) and bool(got[name] == value))
        for name, value in want.items()
    )
