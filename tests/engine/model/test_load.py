import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import engine.model.load
from engine.kernels.cpu.native import NativeKernels, load_kernels
from engine.memory.kv_pool import LayerSpec
from engine.model.checkpoint import stored_dtype, weight_files, weights_digest
from engine.model.load import load_model
from messages.errors import ConfigError
from tests.models import make_tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def copy(tiny, tmp_path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def edit(path: Path, **entries):
    value = json.loads(path.read_text())
    value.update(entries)
    path.write_text(json.dumps({name: entry for name, entry in value.items() if entry is not ...}))


@pytest.mark.slow
def test_what_a_loaded_model_says_of_itself(tiny):
    lines = []
    loaded = load_model(tiny, on_progress=lines.append)
    assert loaded.layer_specs == [LayerSpec(2, 16, 16)] * 4
    assert [layer.num_heads for layer in loaded.layers] == [4] * 4
    assert (loaded.family, loaded.dtype, loaded.device) == ("llama", torch.float32, torch.device("cpu"))
    assert (loaded.vocab_size, loaded.max_model_len, loaded.eos_token_ids) == (320, 1024, (0,))
    assert loaded.num_parameters == sum(tensor.numel() for tensor in load_file(tiny / "model.safetensors").values())
    assert len(loaded.fingerprint) == 32
    assert any("loading llama as float32" in line for line in lines)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_dtype_can_be_asked_for(tiny, dtype):
    loaded = load_model(tiny, dtype=dtype)
    assert str(loaded.dtype) == f"torch.{dtype}"
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {loaded.dtype}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stored", "has_bfloat16", "share", "auto"),
    [
        ("float32", True, 0.25, torch.float32),
        ("bfloat16", True, 0.25, torch.bfloat16),
        ("bfloat16", False, 0.25, torch.float32),
        ("bfloat16", False, 0.0, torch.bfloat16),  # no room to widen it
        ("float16", True, 0.0, torch.float32),
    ],
)
def test_auto_takes_the_stored_dtype_where_the_cpu_computes_in_it(
    tmp_path, monkeypatch, stored, has_bfloat16, share, auto
):
    monkeypatch.setattr(engine.model.load, "can_pack", lambda dtype: dtype is torch.float32 or has_bfloat16)
    monkeypatch.setattr(engine.model.load, "linear_name", lambda *_: "torch")  # where this CPU packs none
    monkeypatch.setattr(engine.model.load, "_WIDENED_SHARE", share)
    directory = make_tiny_model(tmp_path, dtype=getattr(torch, stored))
    assert load_model(directory).dtype is auto
    edit(directory / "config.json", dtype=...)
    assert load_model(directory).dtype is auto


def test_bfloat16_that_is_asked_for_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(engine.model.load, "can_pack", lambda dtype: dtype is torch.float32)
    assert load_model(make_tiny_model(tmp_path), dtype="bfloat16").dtype is torch.bfloat16


def test_a_shorter_context_can_be_asked_for_and_a_longer_one_not(tiny):
    assert load_model(tiny, max_model_len=100).max_model_len == 100
    for wrong in (1025, 0, -5):
        with pytest.raises(ConfigError, match=f"max_model_len is {wrong}, wanted 1 to 1024"):
            load_model(tiny, max_model_len=wrong)


@pytest.mark.slow
def test_the_end_tokens_are_those_generate_stops_at(copy):
    edit(copy / "config.json", eos_token_id=7)
    edit(copy / "generation_config.json", eos_token_id=[3, 9])
    assert load_model(copy).eos_token_ids == (3, 9)
    (copy / "generation_config.json").unlink()
    assert load_model(copy).eos_token_ids == (7,)


# ------------------------------------------------------------------------------------------------------- fingerprints


@pytest.mark.slow
def test_a_fingerprint_stays_over_reloads_and_idle_configuration(copy, tiny):
    first = load_model(tiny).fingerprint
    edit(copy / "config.json", transformers_version="0.0", architectures=["LlamaForCausalLM"], use_cache=False)
    assert load_model(copy).fingerprint == first
    assert load_model(tiny, max_model_len=64).fingerprint == first


@pytest.mark.slow
def test_a_fingerprint_tells_weights_dtype_rope_and_kernel_path_apart(copy, tiny, monkeypatch):
    found = {load_model(tiny).fingerprint, load_model(tiny, dtype="bfloat16").fingerprint}
    edit(copy / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    found.add(load_model(copy).fingerprint)
    weights = load_file(tiny / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    found.add(load_model(copy).fingerprint)
    monkeypatch.setattr("engine.model.load.linear_name", lambda *_: "torch")
    found.add(load_model(tiny, use_kernels=False).fingerprint)
    assert len(found) == 5


def test_paths_share_a_fingerprint_exactly_where_their_bits_are_equal(tiny, monkeypatch):
    kernels = load_kernels()
    if kernels is None or kernels.linear_path is None:
        pytest.skip("kernels not built: python -m engine.kernels.cpu.build")
    first = load_model(tiny, dtype="bfloat16")
    monkeypatch.setattr(kernels, "linear_path", "fma")
    second = load_model(tiny, dtype="bfloat16")
    assert f"/{first.kernel_path.split('/')[1]}/" != "/fma/" or first.kernel_path == second.kernel_path
    assert second.fingerprint == first.fingerprint
    linear = NativeKernels.linear

    def off_by_a_bit(self, x, *args, **keywords):
        out = linear(self, x, *args, **keywords)
        return torch.nextafter(out, torch.full_like(out, 1.0)) if x.shape[-1] > 4000 else out

    monkeypatch.setattr(NativeKernels, "linear", off_by_a_bit)  # nowhere but where a product is long
    assert load_model(tiny, dtype="bfloat16").fingerprint != first.fingerprint


# ----------------------------------------------------------------------------------------------------------- refusals


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no model directory at .*/nowhere$"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"it has no config\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "\xff\xfe", ""])
def test_a_config_that_is_no_json_object_is_refused(copy, text):
    (copy / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json (is not valid JSON|holds a JSON list)"):
        load_model(copy)


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"model_type": ...}, "this model cannot be served: its config.json names no model_type"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "t5 cannot be served: it is an encoder-decoder"),
        ({"model_type": "t5"}, "t5 cannot be served: it is not a decoder"),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "vit cannot be served: it is not a decoder"),
        ({"model_type": "nosuch"}, "nosuch cannot be served: this version of transformers does not know"),
        (
            {"model_type": "nosuch", "auto_map": {"AutoModelForCausalLM": "modeling.Model"}},
            "nosuch cannot be served: it wants to run code from its own directory",
        ),
        ({"architectures": ["LlamaForSequenceClassification"]}, "llama cannot be served: its architecture is Llama"),
        ({"vision_config": {"hidden_size": 8}}, "llama cannot be served: it has a vision part"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"its weights are quantised \(gptq\)"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, r"its weights are quantised \(bitsandbytes\)"),
        ({"quantization_config": "awq"}, r"its weights are quantised \(unknown\)"),
        ({"num_attention_heads": "four"}, "is refused by transformers"),
    ],
)
def test_a_model_we_cannot_serve_is_refused_by_its_configuration(copy, entries, reason):
    edit(copy / "config.json", **entries)
    with pytest.raises(ConfigError, match=reason) as caught:
        load_model(copy)
    assert "\n" not in caught.value.message


def test_a_model_that_has_code_of_its_own_runs_transformers_instead(copy, tiny):
    edit(copy / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Model"})
    (copy / "modeling.py").write_text("raise SystemExit('remote code ran')")
    assert load_model(copy).fingerprint == load_model(tiny).fingerprint


def test_pickled_weights_are_never_read(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="pickled weights only"):
        load_model(copy)
    (copy / "pytorch_model.bin").unlink()
    with pytest.raises(ConfigError, match="has no weights"):
        load_model(copy)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_weights_are_refused(copy, keep):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ConfigError, match=r"model\.safetensors is (truncated|corrupt)"):
        load_model(copy)


@pytest.mark.parametrize("place", [0, 7, 12, 40])
def test_a_corrupt_header_is_refused(copy, place):
    path = copy / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"model\.safetensors|cannot be loaded"):
        load_model(copy)


def test_weights_that_are_not_the_models_are_refused(copy):
    path = copy / "model.safetensors"
    weights = load_file(path)
    missing = {name: tensor for name, tensor in weights.items() if "layers.2.mlp" not in name}
    save_file(missing, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lack 3 tensors, first model\.layers\.2\.mlp\.down_proj"):
        load_model(copy)
    weights["model.norm.weight"] = torch.zeros(8)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_model(copy)


def test_an_unknown_dtype_and_a_missing_device_are_refused(tiny):
    with pytest.raises(ConfigError, match="dtype is 'int8', wanted auto"):
        load_model(tiny, dtype="int8")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="sees no CUDA device"):
            load_model(tiny, device="cuda")


# ------------------------------------------------------------------------------------------------------- weight files


def _split(directory: Path) -> list[Path]:
    """Two shards and an index instead of one file."""
    whole = directory / "model.safetensors"
    weights = load_file(whole)
    whole.unlink()
    names = sorted(weights)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, part in shards.items():
        save_file({name: weights[name] for name in part}, directory / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return [directory / shard for shard in shards]


def test_sharded_weights_load_and_a_missing_shard_is_named(copy, tiny):
    shards = _split(copy)
    assert weight_files(copy) == shards
    assert stored_dtype(shards) == "F32"
    assert load_model(copy).num_parameters == load_model(tiny).num_parameters
    shards[1].unlink()
    with pytest.raises(ConfigError, match=r"lacks the weight file b\.safetensors"):
        load_model(copy)


def test_every_byte_of_the_weights_counts_in_their_digest(copy):
    files = weight_files(copy)
    before = weights_digest(files)
    data = bytearray(files[0].read_bytes())
    data[-1] ^= 1
    files[0].write_bytes(data)
    assert weights_digest(files) != before
