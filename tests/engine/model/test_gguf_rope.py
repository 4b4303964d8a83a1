"""Rotary frequencies that a GGUF file scales are those of the model that it was made from, far into the context too."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from engine.model.gguf_conversion import convert
from engine.model.gguf_rope import rope_scaling
from engine.model.load import load_model
from messages.errors import ConfigError
from tests.gguf_models import original_of, write_gguf
from tests.models import VOCAB_SIZE

pytestmark = pytest.mark.usefixtures("one_thread")

POSITIONS, ORIGINAL, HEAD_DIM = 512, 64, 16
THETA = {"rope_theta": 10000.0}
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": ORIGINAL,
}
SHORT, LONG = [1.0] * (HEAD_DIM // 2), [1.0 + 0.5 * number for number in range(HEAD_DIM // 2)]
LONGROPE = {
    "rope_type": "longrope",
    **{"short_factor": SHORT, "long_factor": LONG, "original_max_position_embeddings": ORIGINAL},
}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": ORIGINAL}


def logits(directory) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    tokens = torch.randint(4, VOCAB_SIZE, (1, POSITIONS), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model(tokens, use_cache=False).logits


def factors_of_llama3() -> np.ndarray:
    """What llama.cpp's converter writes: by what each frequency is divided."""
    config = AutoConfig.for_model("llama", head_dim=HEAD_DIM, rope_parameters=THETA | LLAMA3)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 10000.0 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    return (plain / scaled).numpy()


@pytest.mark.parametrize(
    ("family", "parameters", "metadata", "tensors"),
    [
        pytest.param("llama", LLAMA3, {}, {"rope_freqs.weight": factors_of_llama3()}, id="llama3"),
        pytest.param(
            "phi3",
            LONGROPE,
            {"phi3.rope.scaling.original_context_length": ORIGINAL},
            {
                "rope_factors_short.weight": np.float32(SHORT),
                "rope_factors_long.weight": np.float32(LONG),
            },
            id="longrope",
        ),
        pytest.param(
            "qwen2",
            YARN,
            {
                "qwen2.rope.scaling.type": "yarn",
                "qwen2.rope.scaling.factor": 8.0,
                "qwen2.rope.scaling.original_context_length": ORIGINAL,
            },
            {},
            id="yarn",
        ),
        pytest.param(
            "qwen2",
            YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.5 * (1 + 0.1 * math.log(8.0))},
            {
                "qwen2.rope.scaling.type": "yarn",
                "qwen2.rope.scaling.factor": 8.0,
                "qwen2.rope.scaling.original_context_length": ORIGINAL,
                "qwen2.rope.scaling.attn_factor": 1.5,
                "qwen2.rope.scaling.yarn_beta_fast": 16.0,
                "qwen2.rope.scaling.yarn_beta_slow": 2.0,
            },
            {},
            id="yarn with its own bounds",
        ),
        pytest.param(
            "llama",
            {"rope_type": "linear", "factor": 4.0},
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            {},
            id="linear",
        ),
    ],
)
@pytest.mark.slow
def test_a_model_is_scaled_as_the_one_its_file_was_made_from(family, parameters, metadata, tensors, tmp_path):
    source = write_gguf(
        tmp_path / "tiny.gguf",
        family,
        metadata=metadata,
        tensors=tensors,
        head_dim=HEAD_DIM,
        num_hidden_layers=2,
        max_position_embeddings=POSITIONS,
        rope_parameters=THETA | parameters,
        **({"original_max_position_embeddings": ORIGINAL} if family == "phi3" else {}),
    )
    directory = tmp_path / "made"
    directory.mkdir()
    convert(source, directory)
    assert torch.allclose(logits(directory), logits(original_of(source)), rtol=1e-3, atol=1e-3)
    assert load_model(directory, max_model_len=POSITIONS).max_model_len == POSITIONS


@pytest.mark.parametrize(
    ("entries", "factors"),
    [
        ({}, {}),
        ({"type": "none"}, {}),
        ({"type": "linear", "factor": 1.0}, {}),
        ({"type": "yarn"}, {}),
        ({"type": "yarn", "factor": 0.0}, {}),
    ],
)
def test_what_scales_nothing_says_nothing(entries, factors):
    metadata = {f"llama.rope.scaling.{key}": value for key, value in entries.items()}
    assert rope_scaling({"general.architecture": "llama", **metadata}, factors, 4096) == {}


@pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.scale_linear"])
def test_a_factor_without_a_type_is_linear_as_in_files_of_2023(key):
    metadata = {"general.architecture": "llama", f"llama.{key}": 4.0}
    assert rope_scaling(metadata, {}, 4096) == {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize("factor", [-2.0, float("nan"), float("inf"), "four"])
def test_a_factor_that_is_none_is_refused(factor):
    metadata = {"general.architecture": "llama", "llama.rope.scaling.factor": factor}
    with pytest.raises(ConfigError, match=r"llama\.rope\.scaling\.factor is .*, wanted a number above 0"):
        rope_scaling(metadata, {}, 4096)


def test_a_scaling_that_is_not_known_and_factors_that_are_half_there_are_refused():
    metadata = {
        "general.architecture": "llama",
        "llama.rope.scaling.type": "spiral",
        "llama.rope.scaling.factor": 2.0,
    }
    with pytest.raises(ConfigError, match=r"llama\.rope\.scaling\.type is spiral, wanted none, linear or yarn"):
        rope_scaling(metadata, {}, 4096)
    with pytest.raises(ConfigError, match=r"rope_factors_long\.weight comes without"):
        rope_scaling({"general.architecture": "phi3"}, {"rope_factors_long.weight": [1.0]}, 4096)
