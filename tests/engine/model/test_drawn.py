from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from engine.model.drawn import draw_model
from engine.model.families import read_model_config
from engine.model.load import load_model
from messages.errors import ConfigError

CPU = torch.device("cpu")


@pytest.fixture
def directory(tmp_path) -> Path:
    """A directory with a config.json and no weights."""
    described = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 300,
        "max_position_embeddings": 128,
        "initializer_range": 0.02,
    }
    (tmp_path / "config.json").write_text(json.dumps(described))
    return tmp_path


def weights(directory: Path, seed: int) -> torch.Tensor:
    return draw_model(read_model_config(directory), torch.float32, CPU, seed).get_parameter("lm_head.weight")


def test_the_same_seed_gives_the_same_weights_and_torchs_generator_is_left_alone(directory):
    before = torch.random.get_rng_state()
    one, again, other = (weights(directory, seed) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert 0.019 < float(one.detach().std()) < 0.021
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.slow
def test_a_drawn_model_is_loaded_from_a_directory_without_weights(directory):
    with pytest.raises(ConfigError, match="has no weights"):
        load_model(directory)
    one, again, other = (load_model(directory, drawn_seed=seed, dtype="float32") for seed in (1, 1, 2))
    assert one.fingerprint == again.fingerprint
    assert one.fingerprint != other.fingerprint
    assert (one.max_model_len, one.vocab_size, one.dtype) == (128, 300, torch.float32)


def test_a_model_that_cannot_be_drawn_is_a_line(directory):
    config = read_model_config(directory)
    config.hidden_size = 1 << 40
    with pytest.raises(ConfigError, match=r"^no llama can be drawn on cpu: RuntimeError: ") as raised:
        draw_model(config, torch.float32, CPU, 0)
    assert "\n" not in raised.value.message
