"""The command line: kvray bench engine."""

from __future__ import annotations

import contextlib
import json
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer
from rich.console import Console

from cluster.client import AsJson
from cluster.config import DEMO_MODEL
from messages.errors import ConfigError

if TYPE_CHECKING:
    from cluster.bench.bare.batch import Part

_out = Console(highlight=False, soft_wrap=True, emoji=False)
_err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)

_INTERRUPTED: Final = 130
_TABLE_WIDTH: Final = 110  #: that a spread of two contenders and their ratio has room in
_MODEL, _LOAD, _TOLD = "Model and device", "Workload", "What is told"


def _option(flags: str | tuple[str, ...], text: str, panel: str, default: str | None = None, **more: Any) -> Any:
    names = (flags,) if isinstance(flags, str) else flags
    shown: str | bool = True if default is None else default
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=shown, **more)


def engine(
    model: Annotated[
        str | None, typer.Argument(help="As kvray serve takes it; nothing: the demo model.", show_default=False)
    ] = None,
    shape: Annotated[
        str | None,
        _option("--shape", "Instead of a MODEL: one with drawn weights, llama-8b or smaller.", _MODEL, "none"),
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        _option("--dtype", "Of weights, and of KV unless --kv-cache-dtype says otherwise.", _MODEL),
    ] = "auto",
    kv_cache_dtype: Annotated[
        Literal["auto", "fp8"], _option("--kv-cache-dtype", "Of KV: as the model computes, or float8.", _MODEL)
    ] = "auto",
    device: Annotated[str, _option("--device", "auto, cpu, cuda, or one of several, as cuda:1.", _MODEL)] = "auto",
    threads: Annotated[int | None, _option("--threads", "Of a CPU.", _MODEL, "its cores", min=1, max=4096)] = None,
    max_num_batched_tokens: Annotated[
        int, _option("--max-num-batched-tokens", "Tokens of a step, at most.", _MODEL, min=16, max=2**20)
    ] = 2048,
    batch_size: Annotated[
        int, _option(("--batch-size", "--batch"), "Sequences, all there at once.", _LOAD, min=1, max=65_536)
    ] = 8,
    input_len: Annotated[
        int, _option(("--input-len", "--context"), "Tokens of each prompt.", _LOAD, min=1, max=2**24)
    ] = 512,
    output_len: Annotated[
        int, _option("--output-len", "Tokens that each sequence generates.", _LOAD, min=1, max=2**24)
    ] = 64,
    repeats: Annotated[int, _option("--repeats", "How often it is all done.", _LOAD, min=1)] = 3,
    seed: Annotated[int, _option("--seed", "Of prompts and drawn weights.", _LOAD, min=0)] = 0,
    peer: Annotated[
        Literal["transformers"] | None,
        _option("--peer", "Measure transformers' continuous batching too, in turn.", _TOLD, "none"),
    ] = None,
    output: Annotated[Path | None, _option(("--output", "-o"), "A file for the document.", _TOLD, "none")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the engine alone, in this process, without Ray and HTTP.

    Random prompts, greedy decoding, ends ignored. Prefill and decode are told apart, and as shares of what a copy and a
    product of matrices reach on this machine, now. docs/BENCH.md has more.
    """
    from cluster.bench.bare.measuring import Wanted, measure
    from cluster.bench.plots import check_can_write
    from engine.cores import num_cores

    if model is not None and shape is not None:
        raise ConfigError(f"--shape: wanted either it or a model, saw {shape} and {model}")
    if output is not None:
        check_can_write("--output", output)
    try:
        with _directory(model, shape) as path, _err.status("loading") as status:

            def on_progress(name: str, number: int, part: Part) -> None:
                what = "warming up" if number < 0 else f"{number + 1} of {repeats}, {part}"
                status.update(f"{name}: {what}")

            report = measure(
                Wanted(
                    path=path,
                    name=shape or path.name,
                    is_drawn=shape is not None,
                    dtype=dtype,
                    kv_cache_dtype=kv_cache_dtype,
                    device=device,
                    num_threads=threads or num_cores(),
                    batch_size=batch_size,
                    input_len=input_len,
                    output_len=output_len,
                    repeats=repeats,
                    seed=seed,
                    max_num_batched_tokens=max_num_batched_tokens,
                    has_peer=peer is not None,
                ),
                status.update,
                on_progress,
            )
    except KeyboardInterrupt:
        _err.print("kvray: stopped")
        raise typer.Exit(_INTERRUPTED) from None
    document = report.document()
    if output is not None:
        try:
            output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--output: {output} cannot be written: {error.strerror}") from None
    for line in report.lines():
        _err.print(f"kvray: {line}", markup=False)
    if as_json:
        print(json.dumps(document, indent=2))  # noqa: T201 - machine-readable output
    else:
        _out.print(report.table(), width=max(_out.width, _TABLE_WIDTH), crop=False)
    if "failures" in document:
        raise typer.Exit(1)


@contextlib.contextmanager
def _directory(model: str | None, shape: str | None) -> Iterator[Path]:
    """Give the model directory that is meant; that of a shape is gone afterwards."""
    from cluster.bench.bare.shapes import SHAPES, write_shape

    if shape is None:
        from cluster.model_argument import model_directory

        yield model_directory(model or str(DEMO_MODEL), threading.Event(), lambda line: _err.print(f"kvray: {line}"))
        return
    if shape not in SHAPES:
        raise ConfigError(f"--shape: wanted one of {', '.join(SHAPES)}, saw {shape!r}")
    with tempfile.TemporaryDirectory(prefix="kvray-shape-") as directory:
        write_shape(Path(directory), shape)
        yield Path(directory)
