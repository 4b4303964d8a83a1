import pytest
import torch
from transformers import AutoConfig

from engine.model.load import load_model
from engine.model.rope import original_length
from messages.errors import ConfigError
from tests.models import VOCAB_SIZE, make_tiny_model
from tests.steps import Bench

pytestmark = pytest.mark.usefixtures("one_thread")

LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [float(factor) for factor in range(4, 12)],
    "original_max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    entries = {"original_max_position_embeddings": 64, "max_position_embeddings": 256, "eos_token_id": None}
    return make_tiny_model(tmp_path_factory.mktemp("phi3"), "phi3", rope_parameters=LONG_ROPE, **entries)


def prompt_of(length):
    return torch.randint(4, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def test_the_original_length_is_known_flat_and_per_layer_type():
    for family in ("llama", "gpt2"):
        assert original_length(AutoConfig.for_model(family)) is None
    config = AutoConfig.for_model("llama")
    config.rope_parameters = LONG_ROPE
    assert original_length(config) == 64
    config.rope_parameters = {"full_attention": LONG_ROPE, "sliding_attention": {"rope_type": "default"}}
    assert original_length(config) == 64


def test_a_model_whose_frequencies_change_with_length_is_kept_below_the_change_unless_asked(directory):
    assert load_model(directory).max_model_len == 64
    assert load_model(directory, max_model_len=256).max_model_len == 256
    with pytest.raises(ConfigError, match="max_model_len is 257, wanted 1 to 256"):
        load_model(directory, max_model_len=257)


@pytest.mark.slow
@pytest.mark.parametrize("max_model_len", [64, 256])
def test_a_long_neighbour_does_not_change_a_short_sequence(directory, max_model_len):
    loaded = load_model(directory, max_model_len=max_model_len)
    alone = Bench(loaded)
    wanted = alone.run([alone.add("short", prompt_of(30))], 20)
    together = Bench(loaded)
    sequences = [together.add("short", prompt_of(30)), together.add("long", prompt_of(max_model_len - 21))]
    assert together.run(sequences, 20, max_step_tokens=512)[:1] == wanted


@pytest.mark.slow
def test_kv_of_the_two_frequencies_never_shares_a_name(directory):
    short, long = load_model(directory), load_model(directory, max_model_len=256)
    assert short.fingerprint != long.fingerprint
    assert load_model(directory, max_model_len=65).fingerprint == long.fingerprint
    outputs = []
    for loaded in (short, long):
        bench = Bench(loaded)
        outputs.append(bench.run([bench.add("s", prompt_of(40))], 20))
    assert outputs[0] != outputs[1]
