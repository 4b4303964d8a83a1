"""bfloat16 linears: whatever is multiplied beside a row, by whichever path, its bits are those of the definition."""

import itertools
import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from engine.kernels.cpu import native
from engine.kernels.cpu.native import NativeKernels, load_kernels, pack_weights

KERNELS = Path(native.__file__).parent

#: Depths and widths of real models, of which a few columns are enough: each is summed by itself.
DEPTHS = (704, 768, 2048, 2880, 4096, 8192)
SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 13, 16, 17, 31, 32, 33, 63, 100, 255, 256, 257, 511, 1025, 1500, 2048)


class _Module:
    """The library's linears, with results of their own to write to."""

    def __init__(self, raw) -> None:
        self.raw = raw
        self.gate = raw.gate

    def pack_weights(self, weights, path):
        return pack_weights(self.raw, weights, path)

    def unpack_weights(self, words, width, depth, path):
        weights = torch.empty(len(words), width, depth).bfloat16()
        self.raw.unpack_weights(words, path, weights)
        return weights

    def linear(self, x, words, bias, width, counts, path, is_gelu=None):
        out = torch.empty(len(x), width).bfloat16()
        self.raw.linear(x, words, bias, counts, path, is_gelu, out)
        return out

    def linear_by_definition(self, x, weight, bias):
        out = torch.empty(len(x), len(weight)).bfloat16()
        self.raw.linear_by_definition(x, weight, bias, out)
        return out


@pytest.fixture(scope="module")
def module():
    loaded = load_kernels()
    if loaded is None:
        pytest.skip("kernels not built: python -m engine.kernels.cpu.build")
    return _Module(loaded._module)


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def paths(module):
    return module.raw.linear_paths.split()


def cancelling(depth: int, width: int, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and a weight whose exact products are zero: results are rounding, so any other order of summation shows."""
    generator = torch.Generator().manual_seed(depth)
    order = torch.randperm(depth // 2 * 2, generator=generator)
    weight, rows = (torch.randn(n, depth // 2, generator=generator) for n in (width, num_rows))
    return (
        torch.cat([rows, -rows], 1)[:, order].bfloat16().contiguous(),
        torch.cat([weight, weight], 1)[:, order].bfloat16().contiguous(),
    )


def multiply(module, path, rows, weight, bias=None):
    return module.linear(rows, module.pack_weights(weight[None], path), bias, len(weight), [len(rows)], path)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


def check_rows(module, path, depth, *, width, sizes, threads):
    rows, weight = cancelling(depth, width, max(sizes))
    words = module.pack_weights(weight[None], path)
    whole = module.linear(rows, words, None, width, [len(rows)], path)
    some = torch.arange(0, len(rows), 97)
    assert same_bits(whole[some], module.linear_by_definition(rows[some].contiguous(), weight, None))
    for count, size in itertools.product(threads, sizes):
        torch.set_num_threads(count)
        for begin in {0, 7, 700, len(rows) - size}:
            if begin + size <= len(rows):
                got = module.linear(rows[begin : begin + size], words, None, width, [size], path)
                assert same_bits(got, whole[begin : begin + size]), (size, begin, count)


@pytest.mark.slow
def test_a_row_has_the_same_bits_in_any_batch_at_the_depths_of_real_models(module):
    for path in paths(module):
        for depth in (768, 8192):
            check_rows(module, path, depth, width=33, sizes=(1, 2, 4, 7, 16, 33, 65, 300), threads=(1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("depth", DEPTHS)
def test_a_row_has_the_same_bits_in_every_batch_place_and_number_of_threads(module, depth):
    for path in paths(module):
        check_rows(module, path, depth, width=96, sizes=SIZES, threads=(1, 2, 3, 4))


@pytest.mark.parametrize(
    ("depth", "width"), [(1, 1), (7, 5), (31, 32), (32, 33), (33, 31), (64, 64), (100, 70), (704, 40)]
)
def test_every_path_gives_the_bits_of_the_definition_and_the_weight_again(module, depth, width):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(70, depth, generator=generator).bfloat16()
    weight = torch.randn(width, depth, generator=generator).bfloat16()
    bias = torch.randn(width, generator=generator).bfloat16()
    wanted = module.linear_by_definition(rows, weight, bias)
    torch.testing.assert_close(
        wanted, torch.nn.functional.linear(rows, weight, bias), rtol=2e-2, atol=2e-2 * depth**0.5
    )
    for path in paths(module):
        words = module.pack_weights(weight[None], path)
        assert torch.equal(module.unpack_weights(words, width, depth, path)[0], weight)
        for size in (0, 1, 2, 3, 4, 5, 6, 15, 16, 17, 32, 70):
            assert same_bits(module.linear(rows[:size], words, bias, width, [size], path), wanted[:size]), (path, size)
        spaced = torch.zeros(70, depth + 3).bfloat16()
        spaced[:, :depth] = rows
        assert same_bits(module.linear(spaced[:, :depth], words, bias, width, [70], path), wanted), path


def test_infinities_nans_and_subnormal_numbers_come_out_the_same_on_every_path(module):
    tiny, nan, inf = 1e-39, float("nan"), float("inf")  # tiny is subnormal: it counts as zero
    values = torch.tensor([tiny, -tiny, 1e38, -1e38, inf, -inf, nan, 1.0, 0.0, -0.0, 1e-20, -1e-20]).bfloat16()
    generator = torch.Generator().manual_seed(0)
    rows, weight = (values[torch.randint(len(values), (n, 64), generator=generator)] for n in (40, 40))
    rows[:20] = rows[:20].nan_to_num(nan=1.0, posinf=2.0, neginf=1e-20)  # these keep their sums finite more often
    weight[:20] = weight[:20].nan_to_num(nan=1.0, posinf=2.0, neginf=1e-20)
    bias = values[torch.randint(len(values), (40,), generator=generator)]
    for added in (None, bias):
        wanted = module.linear_by_definition(rows, weight, added)
        assert wanted.isnan().any()
        assert wanted.isinf().any()
        assert wanted.isfinite().any()
        assert set(wanted[wanted.isnan()].view(torch.int16).tolist()) == {0x7FC0}
        for path in paths(module):
            assert same_bits(multiply(module, path, rows, weight, added), wanted), path
    ones = torch.full((1, 32), 1.0).bfloat16()
    for path in paths(module):
        assert not multiply(module, path, ones * tiny, ones * 1e38).any(), path
        assert not multiply(module, path, ones * 1e-30, ones * 1e-30).any(), path


def test_groups_of_rows_are_multiplied_by_their_own_weights_as_if_alone(module):
    counts = [3, 0, 40, 1, 0, 7]
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(len(counts), 50, 100, generator=generator).bfloat16()
    biases = torch.randn(len(counts), 50, generator=generator).bfloat16()
    rows = torch.randn(sum(counts), 100, generator=generator).bfloat16()
    wanted = [
        module.linear_by_definition(part, weight, bias)
        for part, weight, bias in zip(rows.split(counts), weights, biases, strict=True)
    ]
    for path in paths(module):
        words = module.pack_weights(weights, path)
        assert torch.equal(module.unpack_weights(words, 50, 100, path), weights)
        assert same_bits(module.linear(rows, words, biases, 50, counts, path), torch.cat(wanted))


@pytest.mark.parametrize("is_gelu", [False, True])
@pytest.mark.parametrize("width", [7, 80, 96])
def test_a_gated_layer_has_the_bits_of_two_linears_and_the_gate(module, is_gelu, width):
    generator = torch.Generator().manual_seed(0)
    rows, gate, up, biases = (
        (torch.randn(shape, generator=generator) / 8).bfloat16()
        for shape in ((300, 100), (width, 100), (width, 100), (2, width))
    )
    for path, bias, count in itertools.product(paths(module), (None, biases), (1, 3, 5, 16, 17, 100, 300)):
        parts = [module.pack_weights(weight[None], path) for weight in (gate, up)]
        opened, raised = (
            module.linear(rows[:count], words, each, width, [count], path)
            for words, each in zip(parts, (None, None) if bias is None else biases, strict=True)
        )
        module.gate(opened, raised, is_gelu)
        got = module.linear(rows[:count], torch.cat(parts, 1), bias, width, [count], path, is_gelu)
        assert same_bits(got, opened), (path, count)


@pytest.mark.slow
def test_more_rows_than_fit_one_pass_are_multiplied_in_several(module):
    rows, weight = cancelling(8192, 32, 5000)
    for path in paths(module):
        got = multiply(module, path, rows, weight)
        assert same_bits(got[4990:], module.linear_by_definition(rows[4990:].contiguous(), weight, None)), path


def test_wrong_shapes_and_types_are_refused_with_what_was_seen(module):
    words = module.pack_weights(torch.zeros(1, 40, 64).bfloat16(), "fma")
    rows = torch.zeros(3, 64).bfloat16()
    with pytest.raises(RuntimeError, match="x: want bfloat16"):
        module.linear(rows.float(), words, None, 40, [3], "fma")
    with pytest.raises(RuntimeError, match=r"weights packed as \[1, 2, 2, 512\], want int32 \[1, 2, 4, 512\]"):
        module.linear(torch.zeros(3, 100).bfloat16(), words, None, 40, [3], "fma")
    with pytest.raises(RuntimeError, match="counts: want 3 in all"):
        module.linear(rows, words, None, 40, [2], "fma")
    with pytest.raises(RuntimeError, match="bias: want contiguous"):
        module.linear(rows, words, torch.zeros(7).bfloat16(), 40, [3], "fma")
    with pytest.raises(RuntimeError, match="linear path is wings, want one of"):
        module.linear(rows, words, None, 40, [3], "wings")
    with pytest.raises(RuntimeError, match="y: want contiguous bfloat16"):
        module.raw.linear(rows, words, None, [3], "fma", None, torch.zeros(2, 40).bfloat16())
    with pytest.raises(RuntimeError, match="want a tensor"):
        module.raw.linear(rows, words, "bias", [3], "fma", None, torch.zeros(3, 40).bfloat16())
    with pytest.raises(RuntimeError, match="got 2 arguments, want more"):
        module.raw.linear(rows, words)
    with pytest.raises(RuntimeError, match="got 4 arguments, want 3"):
        module.raw.gate(rows, rows, True, 1)
    with pytest.raises(TypeError, match="integer"):
        module.raw.linear(rows, words, None, ["three"], "fma", None, torch.zeros(3, 40).bfloat16())


class _Biased:
    """Kernels of which some paths add one to the last result."""

    def __init__(self, module, wrong: set[str]) -> None:
        self._module = module
        self._wrong = wrong

    def __getattr__(self, name: str) -> object:
        return getattr(self._module, name)

    def linear(self, *args):
        self._module.linear(*args)
        if args[4] in self._wrong:
            args[-1][-1, -1] += 1


def test_a_path_with_other_bits_is_not_taken_and_told_in_one_line(module, caplog):
    offered = paths(module)
    assert NativeKernels(module.raw).linear_path == offered[0]
    assert not caplog.records
    assert NativeKernels(_Biased(module.raw, {offered[0]})).linear_path == (offered[1] if len(offered) > 1 else None)
    assert [record.getMessage() for record in caplog.records] == [
        f"linears by {offered[0]!r} give other bits here than they should: not used"
    ]
    assert NativeKernels(_Biased(module.raw, set(offered))).linear_path is None


PROGRAM = r"""
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "linear.h"

using namespace kvray;

// A product by the path that the build names.
void multiply(Linear job) {
  job.path = LinearPath::KVRAY_TEST_PATH;
  job.lay_out();
  job.packed_rows = static_cast<char*>(std::aligned_alloc(64, (job.num_units * job.unit_bytes + 63) / 64 * 64));
  for (int64_t i = 0; i < job.num_units; i++) pack_row_unit(job, i);
  const LinearTasks tasks = cut_linear(job);
  for (int64_t i = 0; i < tasks.count; i++) linear_task(job, tasks, i);
  std::free(job.packed_rows);
}

// Products of two layers, apart and gated, by a path and by the definition: prints how many results differ.
int main() {
  const int64_t depth = 100, width = 40, num_rows = 81, panels = 4, blocks = 2;
  std::vector<bf16> x(num_rows * depth), w(2 * width * depth), bias(2 * width);
  std::vector<bf16> y(num_rows * width), gate(y), up(y);
  uint32_t state = 1;
  for (auto* all : {&x, &w, &bias})
    for (bf16& value : *all) {
      state = state * 1664525u + 1013904223u;
      value.bits = static_cast<uint16_t>((state >> 16 & 0x807f) | (120 + (state >> 8) % 12) << 7);
    }
  std::vector<uint32_t> words(2 * blocks * panels * kPanelWords);
  for (int64_t i = 0; i < 2 * blocks; i++)
    pack_weights(LinearPath::KVRAY_TEST_PATH, w.data() + i / blocks * width * depth, width, depth, i % blocks,
                 words.data() + i / blocks * blocks * panels * kPanelWords);
  int64_t differ = 0;
  for (int64_t count = 1; count <= num_rows; count++) {
    Linear job{};
    job.x = x.data();
    job.x_row = depth;
    job.weights = words.data();
    job.bias = bias.data();
    job.y = y.data();
    job.num_rows = count;
    job.width = width;
    job.depth = depth;
    linear_by_definition(x.data(), w.data(), bias.data(), count, width, depth, gate.data());
    linear_by_definition(x.data(), w.data() + width * depth, bias.data() + width, count, width, depth, up.data());
    multiply(job);
    for (int64_t i = 0; i < count * width; i++) differ += y[i].bits != gate[i].bits;
    job.gate = Activation::kSilu;
    multiply(job);
    gate_row(gate.data(), up.data(), static_cast<int>(count * width), Activation::kSilu);
    for (int64_t i = 0; i < count * width; i++) differ += y[i].bits != gate[i].bits;
  }
  std::printf("%lld of %lld floats a vector differ\n", static_cast<long long>(differ), static_cast<long long>(W));
}
"""

TARGETS = {  # compiler, flags, floats a vector, what runs the program
    "AVX-512": ("g++", "-march=x86-64-v4", 16, ()),
    "AVX2": ("g++", "-march=x86-64-v3", 8, ()),
    "SSE2": ("g++", "-march=x86-64", 4, ()),
    "NEON": ("aarch64-linux-gnu-g++", "-march=armv8-a", 4, ("qemu-aarch64-static",)),
}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_other_machines_instructions_give_the_bits_of_the_definition_too(tmp_path, target):
    compiler, flag, floats, runner = TARGETS[target]
    if not all(shutil.which(tool) for tool in (compiler, *runner)):
        pytest.skip(f"{' or '.join((compiler, *runner))} is not installed")
    if not runner and platform.machine() != "x86_64":
        pytest.skip("names instruction sets of x86-64")
    if target == "AVX-512" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("this CPU has no AVX-512")
    assert run_program(tmp_path, "kFma", compiler, flag, runner=runner) == f"0 of {floats} floats a vector differ\n"


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="tiles are x86-64's")
def test_tiles_as_they_are_defined_give_the_bits_of_the_definition_too(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    emulation = Path(__file__).with_name("emulated_tiles.h")
    flags = ["-march=x86-64-v3", "-include", str(emulation)]
    assert run_program(tmp_path, "kTiles", "g++", *flags) == "0 of 8 floats a vector differ\n"


def run_program(directory: Path, path: str, compiler: str, *flags: str, runner: tuple[str, ...] = ()) -> str:
    """Compile PROGRAM for one path with the kernels that it needs, and return what it prints."""
    (directory / "program.cpp").write_text(PROGRAM)
    always = ["-std=c++17", "-O3", "-ffp-contract=off", "-static", "-Wno-psabi", f"-I{KERNELS}"]
    sources = [directory / "program.cpp", KERNELS / "linear.cpp", KERNELS / "elementwise.cpp"]
    command = [compiler, *always, *flags, f"-DKVRAY_TEST_PATH={path}", *sources, "-o", directory / "program"]
    subprocess.run(command, check=True, capture_output=True)
    return subprocess.check_output([*runner, directory / "program"], text=True, env=os.environ)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="tiles are x86-64's")
def test_tiles_are_compiled_whatever_this_cpu_has(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    assembly = tmp_path / "linear.s"
    command = ["g++", "-std=c++17", "-O3", "-march=x86-64-v3", "-S", str(KERNELS / "linear.cpp"), "-o", str(assembly)]
    subprocess.run(command, check=True, capture_output=True)
    assert "tdpbf16ps" in assembly.read_text()
