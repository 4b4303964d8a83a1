"""Starts that fail say so in one line; starts that are interrupted, and serving that ends, leave nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ray

from cluster.config import KvrayConfig
from cluster.keeper import Keeper, config_error_in
from cluster.keeper_messages import KeeperTask
from cluster.launch import stop_signals
from messages.errors import WorkerError
from tests.cluster.starting import Starting, wait_until
from tests.models import make_tiny_model
from tests.served import free_port, own_environment, run_kvray

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]

ERROR_WITHIN_S = 60.0  #: an error that a replica finds; most of it is Ray's own start, on a machine that others use too
STOPPED_WITHIN_S = 10.0
RAY_AGENTS = {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def model_dir(tiny_model, tmp_path):
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def complaint_of(*arguments: str, environment: dict[str, str] | None = None) -> str:
    """The one line in which `kvray serve` refuses to start; checks all else that must hold then."""
    arguments = arguments if "--port" in arguments else (*arguments, "--port", str(free_port()))
    finished, left = run_kvray("serve", *arguments, "--log-level", "warning", extra_environment=environment)
    assert finished.returncode == 2, finished.stderr
    assert left == []
    assert finished.stdout == ""
    lines = finished.stderr.splitlines()
    assert len(lines) == 1, finished.stderr
    assert lines[0].startswith("kvray: ")
    return lines[0].removeprefix("kvray: ")


def remove(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    data = content.encode() if isinstance(content, str) else content
    return lambda directory: (directory / name).write_bytes(data) and None


def change_config(**entries: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "config.json"
        config = json.loads(path.read_text()) | entries
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

    return change


def truncate_weights(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickle_weights(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def lose_a_shard(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


BROKEN_DIRECTORIES = {
    "no config": (remove("config.json"), ["no config.json"]),
    "config not JSON": (write("config.json", "{'model_type':"), ["config.json is not valid JSON"]),
    "config no object": (write("config.json", "[1]"), ["config.json holds a JSON list, wanted an object"]),
    "no tokenizer": (remove("tokenizer.json"), ["no tokenizer", "tokenizer.json"]),
    "corrupt tokenizer": (write("tokenizer.json", '{"model": 3}'), ["tokenizer.json cannot be read"]),
    "tokenizer not text": (write("tokenizer.json", b"\xff\xfe\x00"), ["tokenizer.json cannot be read"]),
    "corrupt template": (write("chat_template.jinja", "{% for %}"), ["chat template"]),
    "no weights": (remove("model.safetensors"), ["no weights", "wanted model.safetensors"]),
    "truncated weights": (truncate_weights, ["model.safetensors is truncated or corrupt", "bytes"]),
    "weights are text": (write("model.safetensors", "version https://git-lfs"), ["model.safetensors is corrupt"]),
    "empty weights": (write("model.safetensors", ""), ["model.safetensors is corrupt"]),
    "pickled weights": (pickle_weights, ["pickled weights only", "wanted model.safetensors"]),
    "lost shard": (lose_a_shard, ["lacks the weight file model-00002-of-00002.safetensors"]),
}


@pytest.mark.parametrize("case", BROKEN_DIRECTORIES)
def test_a_broken_model_directory_is_refused_in_one_line(case, model_dir):
    change, words = BROKEN_DIRECTORIES[case]
    change(model_dir)
    complaint = complaint_of(str(model_dir))
    for word in [*words, str(model_dir)]:
        assert word in complaint


def test_a_directory_that_is_none_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    assert complaint_of(str(tmp_path / "none")).startswith(f"no model directory at {tmp_path / 'none'}")
    assert "is a file, wanted a transformers model directory" in complaint_of(str(tmp_path / "file"))


BAD_FLAGS = {
    "--port=70000": "http.port: wanted 1 to 65535, saw 70000",
    "--prefill=-1": "pools.prefill: wanted 0 to 4096, saw -1",
    "--decode=0": "pools.decode: wanted 1 to 4096, saw 0",
    "--block-size=0": "engine.block_size: wanted 1 to 1024, saw 0",
    "--threads=0": "engine.num_threads: wanted 1 to 4096, saw 0",
    "--max-model-len=0": "model.max_model_len: wanted 1 to 1073741824, saw 0",
    "--dtype=float8": "model.dtype: wanted one of auto, float32, bfloat16, float16, saw str 'float8'",
    "--kv-cache-memory=banana": "engine.kv_cache_memory: wanted a size such as 512MiB or 2GiB, saw 'banana'",
    "--host=no.such.host.invalid": "http: cannot listen on no.such.host.invalid",
}


@pytest.mark.parametrize("flag", BAD_FLAGS)
def test_an_absurd_flag_is_refused_in_one_line(flag, tiny_model):
    arguments = [str(tiny_model), *flag.split("=")]
    assert complaint_of(*arguments).startswith(BAD_FLAGS[flag])


@pytest.mark.parametrize("arguments", [["--no-such-flag"], ["--port", "many"]])
def test_usage_errors_exit_with_2_too(arguments):
    finished, _ = run_kvray("serve", *arguments)
    assert finished.returncode == 2
    assert arguments[0] in finished.stderr
    assert "Traceback" not in finished.stderr


def test_a_bad_configuration_file_is_refused_in_one_line(tiny_model, tmp_path):
    path = tmp_path / "kvray.yaml"
    path.write_text("engine: {blok_size: 8}")
    assert complaint_of(str(tiny_model), "--config", str(path)) == (
        "engine.blok_size: no such key; did you mean block_size?"
    )


def test_a_bad_secret_is_refused_and_not_repeated(tiny_model):
    complaint = complaint_of(str(tiny_model), environment={"KVRAY_SECRET": "5ecre7"})
    assert complaint == "KVRAY_SECRET: wanted 64 hexadecimal digits, saw 6 characters that are not"


def test_a_port_in_use_is_refused_in_one_line(tiny_model):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        complaint = complaint_of(str(tiny_model), "--port", str(port))
    assert complaint == f"http: cannot listen on 127.0.0.1 port {port}: Address already in use"


def test_a_ray_address_where_nobody_answers_is_refused_in_one_line(tiny_model):
    address = f"127.0.0.1:{free_port()}"
    began_s = time.monotonic()
    complaint = complaint_of(str(tiny_model), environment={"RAY_ADDRESS": address})
    assert complaint == f"RAY_ADDRESS: no Ray cluster answers at {address}: Connection refused"
    assert time.monotonic() - began_s < 15


REFUSED_MODELS = {
    "t5": (change_config(model_type="t5", is_encoder_decoder=True), "t5 cannot be served: it is an encoder-decoder"),
    "bert": (
        change_config(model_type="bert", architectures=["BertForMaskedLM"]),
        "bert cannot be served: its architecture is BertForMaskedLM, wanted BertLMHeadModel",
    ),
    "clip": (
        change_config(model_type="clip", architectures=["CLIPModel"]),
        "clip cannot be served: it is not a decoder",
    ),
    "remote code": (
        change_config(model_type="ours", auto_map={"AutoModelForCausalLM": "modeling.Ours"}),
        "ours cannot be served: it wants to run code from its own directory, which is never done",
    ),
    "unknown family": (change_config(model_type="ours"), "ours cannot be served: this version of transformers"),
    "no family": (change_config(model_type=None), "this model cannot be served: its config.json names no model_type"),
    "quantised": (
        change_config(quantization_config={"quant_method": "gptq"}),
        "llama cannot be served: its weights are quantised (gptq)",
    ),
    "impossible values": (change_config(num_attention_heads="four"), "config.json is refused by transformers"),
}


@pytest.mark.parametrize("case", REFUSED_MODELS)
def test_a_model_that_cannot_be_served_is_refused_before_ray_starts(case, model_dir):
    change, words = REFUSED_MODELS[case]
    change(model_dir)
    assert words in complaint_of(str(model_dir))


def test_more_tokens_than_the_model_has_positions_are_refused(tiny_model):
    complaint = complaint_of(str(tiny_model), "--max-model-len", "1025")
    assert complaint == "max_model_len is 1025, wanted 1 to 1024 (the model's positions)"


@pytest.mark.alone
def test_too_little_memory_for_one_sequence_reaches_the_terminal_from_the_worker(tiny_model):
    began_s = time.monotonic()
    complaint = complaint_of(str(tiny_model), "--kv-cache-memory", "64KiB")
    assert complaint.startswith("too little memory for one sequence: 1024 tokens need 1048576 bytes")
    assert time.monotonic() - began_s < ERROR_WITHIN_S


@pytest.mark.alone
def test_a_family_that_cannot_work_is_refused_by_name_and_reason(tmp_path):
    sizes = {"state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 1, "num_attention_heads": None}
    model_dir = make_tiny_model(tmp_path / "mamba2", family="mamba2", **sizes)
    complaint = complaint_of(str(model_dir), "--max-model-len", "256")
    assert complaint.startswith("mamba2 cannot be served: it keeps recurrent state")


@pytest.mark.alone
def test_accelerators_that_the_node_lacks_are_not_waited_for(tiny_model, tmp_path):
    path = tmp_path / "kvray.yaml"
    path.write_text("pools: {gpus_per_worker: 64}")
    complaint = complaint_of(str(tiny_model), "--config", str(path))
    assert complaint.startswith("pools.gpus_per_worker: 2 workers with 64 each were asked for, this node has ")


# ------------------------------------------------------------------------------------------------------ interruptions


@pytest.fixture
def starting(tiny_model, tmp_path):
    with own_environment() as environment:
        process = Starting(tiny_model, tmp_path, environment)
        yield process
        process.clean()


@pytest.mark.alone
@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("reading the model", signal.SIGINT),
        ("starting Ray", signal.SIGTERM),
        ("placing workers", signal.SIGINT),
        ("starting Decode", signal.SIGTERM),
        ("Ctrl-C ends everything", signal.SIGTERM),
    ],
)
def test_a_signal_ends_a_start_at_any_moment(starting, moment, number):
    starting.wait_for(moment)
    began_s = time.monotonic()
    if number == signal.SIGINT:
        os.killpg(starting.process.pid, number)  # Ctrl-C reaches everything in the foreground
    else:
        starting.process.send_signal(number)
    assert starting.process.wait(STOPPED_WITHIN_S + 5) == 0
    assert time.monotonic() - began_s < STOPPED_WITHIN_S
    assert starting.survivors() == []
    lines = starting.log.read_text().splitlines()
    for word in ("Traceback", "SIGTERM received"):
        assert word not in starting.log.read_text()
    if moment != "Ctrl-C ends everything":
        assert lines[-1] == "kvray: stopped while starting"


@pytest.mark.alone
def test_a_sigkill_of_the_command_line_ends_everything_but_rays_own_agents(starting):
    """The raylet's two agents (2.60) notice its death only after minutes; they hold no port of ours and no model."""
    starting.wait_for("Ctrl-C ends everything")
    starting.process.kill()
    starting.process.wait(5)
    wait_until(lambda: {process.name() for process in starting.survivors()} <= RAY_AGENTS, 20)


# -------------------------------------------------------------------------------------------------------------- pieces


def test_stop_signals_are_noticed_and_the_former_handlers_come_back():
    former = signal.getsignal(signal.SIGTERM)
    with stop_signals() as stop:
        assert not stop.is_set()
        signal.raise_signal(signal.SIGTERM)
        assert stop.is_set()
    assert signal.getsignal(signal.SIGTERM) is former


def test_the_reason_is_found_in_what_serve_says_of_a_replica():
    message = (
        "A replica failed to start with exception. Retrying 2 more time(s). Error:\n"
        "ray::ServeReplica:kvray:Decode.initialize_and_get_metadata() (pid=1)\n"
        '    raise ConfigError(f"{path} is corrupt")\n'
        "messages.errors.ConfigError: /m/model.safetensors is corrupt\n"
        "\nThe above exception was the cause\n"
    )
    assert config_error_in(message) == "/m/model.safetensors is corrupt"
    assert config_error_in("RuntimeError: out of memory") is None


def test_a_ray_that_is_slow_to_start_is_one_clear_error(monkeypatch):
    def slow(**_: object) -> None:
        raise Exception("The current node timed out during startup.\nDetails follow.")  # noqa: TRY002 - as Ray does

    monkeypatch.setattr("ray.init", slow)
    line, other = socket.socketpair()
    with line, other:
        for address, words in ((None, "start"), ("10.0.0.1:6379", "join the cluster at 10.0.0.1:6379")):
            keeper = Keeper(KeeperTask(config=KvrayConfig(), address=address, listener=None), line)
            with pytest.raises(WorkerError) as caught:
                keeper._connect(ray)
            assert caught.value.message == (
                f"Ray did not {words}, this time: Exception: The current node timed out during startup."
            )
