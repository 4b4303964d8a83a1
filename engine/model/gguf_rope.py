"""How a GGUF file scales rotary frequencies, which transformers' reader takes for gpt-oss alone (release 5.23).

Llama 3.1 and its kin come with a tensor of factors, Phi 3 with two, of which the length of the context decides; other
files name a linear or YaRN scaling in their metadata.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from gguf import Keys

from messages.errors import ConfigError

#: What files of 2023 call the factor of a linear scaling.
_OLD_FACTOR: Final = "{arch}.rope.scale_linear"
_ANY_LENGTH, _SHORT, _LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
#: Tensors that hold what each frequency is divided by.
FACTOR_TENSORS: Final = frozenset({_ANY_LENGTH, _SHORT, _LONG})
_BETAS: Final = {"beta_fast": Keys.Rope.SCALING_YARN_BETA_FAST, "beta_slow": Keys.Rope.SCALING_YARN_BETA_SLOW}


def rope_scaling(
    metadata: Mapping[str, Any], factors: Mapping[str, Sequence[float]], num_positions: int
) -> dict[str, Any]:
    """Return what a model's `rope_parameters` have to say of scaling, as transformers names it; {}: nothing.

    Args:
        metadata: of the file, by its keys.
        factors: what is in those of `FACTOR_TENSORS` that the file has.
        num_positions: the longest context that the file names.

    Raises:
        ConfigError: it is scaled in a way that is not known here, or a number is missing.
    """
    architecture = metadata[Keys.General.ARCHITECTURE]
    kind = metadata.get(Keys.Rope.SCALING_TYPE.format(arch=architecture), "linear")  # as llama.cpp takes it
    old_factor = metadata.get(_OLD_FACTOR.format(arch=architecture))
    factor = metadata.get(Keys.Rope.SCALING_FACTOR.format(arch=architecture), old_factor)
    attention = metadata.get(Keys.Rope.SCALING_ATTN_FACTOR.format(arch=architecture))
    original = metadata.get(Keys.Rope.SCALING_ORIG_CTX_LEN.format(arch=architecture))
    if _ANY_LENGTH in factors:
        same = list(factors[_ANY_LENGTH])
        return _longrope(same, same, num_positions, 1.0)
    if _LONG in factors:
        if _SHORT not in factors or original is None:
            raise ConfigError(f"{_LONG} comes without {_SHORT}, or without {Keys.Rope.SCALING_ORIG_CTX_LEN}")
        return _longrope(list(factors[_SHORT]), list(factors[_LONG]), original, attention)
    if kind == "none" or not factor or factor == 1.0:  # 0: none, as llama.cpp takes it
        return {}
    if not isinstance(factor, int | float) or not 0.0 < factor < math.inf:
        raise ConfigError(f"{Keys.Rope.SCALING_FACTOR.format(arch=architecture)} is {factor}, wanted a number above 0")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        scaling: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
        scaling["original_max_position_embeddings"] = original or round(num_positions / factor)
        betas = {name: metadata.get(key.format(arch=architecture)) for name, key in _BETAS.items()}
        if attention is not None:  # llama.cpp multiplies by it what transformers has without one
            scaling["attention_factor"] = attention * (1.0 + 0.1 * math.log(max(factor, 1.0)))
        return scaling | {name: beta for name, beta in betas.items() if beta is not None}
    raise ConfigError(f"{Keys.Rope.SCALING_TYPE.format(arch=architecture)} is {kind}, wanted none, linear or yarn")


def _longrope(short: list[float], long: list[float], original: int, attention: float | None) -> dict[str, Any]:
    scaling: dict[str, Any] = {"rope_type": "longrope", "original_max_position_embeddings": original}
    factors = {"short_factor": short, "long_factor": long}
    return {**scaling, **factors, **({} if attention is None else {"attention_factor": attention})}
