"""Prefill attention on AMX's tiles, which are emulated: near the one in registers, the same bits in any chunks."""

import subprocess
from pathlib import Path

import pytest

from engine.kernels.cpu import native
from engine.kernels.cpu.native import load_kernels

KERNELS = Path(native.__file__).parent
EMULATION = Path(__file__).with_name("emulated_tiles.h")

PROGRAM = r"""
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include "attention.h"

using namespace kvray;

constexpr int kBlock = 16, kLength = 300, kGroup = 3, kKvHeads = 2, kHeads = kGroup * kKvHeads;

// Rows [begin, end) of a prompt as one chunk.
void attend(PrefillAttention<bf16> a, const int32_t* table, int begin, int end) {
  a.q += begin * a.q_row;
  a.out += begin * a.out_row;
  const Chunk chunk{0, end - begin, end, table};
  const int tile = query_tile(kGroup);
  for (int first = 0; first < chunk.q_len; first += tile)
    for (int head = 0; head < kKvHeads; head++)
      prefill_tile<bf16>(a, chunk, head, first, std::min(tile, chunk.q_len - first));
}

// Prints the largest difference between both ways, and how many results differ between a whole prompt and its chunks.
void compare(int k_dim, int v_dim, int window) {
  const int blocks = (kLength + kBlock - 1) / kBlock, kv = kBlock * kKvHeads;
  std::vector<bf16> k(blocks * kv * k_dim), v(blocks * kv * v_dim), q(kLength * kHeads * k_dim);
  uint32_t state = 1;
  for (auto* all : {&k, &v, &q})
    for (bf16& value : *all) {
      state = state * 1664525u + 1013904223u;
      vf x = splat(static_cast<float>(state >> 8) / (1 << 23) - 1.f);
      value.bits = narrow(x)[0];
    }
  std::vector<int32_t> table(blocks);
  for (int i = 0; i < blocks; i++) table[i] = (i * 7) % blocks;
  std::vector<bf16> outs[3];
  for (auto& out : outs) out.resize(kLength * kHeads * v_dim);
  PrefillAttention<bf16> a{
      {k.data(), v.data(), kv * k_dim, k_dim, kBlock * k_dim, kv * v_dim, v_dim, kBlock * v_dim, kBlock, kKvHeads,
       k_dim, v_dim},
      {1.f / std::sqrt(static_cast<float>(k_dim)), 0.f, window, 0, nullptr},
      q.data(), kHeads * k_dim, k_dim, outs[0].data(), kHeads * v_dim, v_dim, kHeads, false};
  attend(a, table.data(), 0, kLength);
  a.is_on_tiles = true;
  a.out = outs[1].data();
  attend(a, table.data(), 0, kLength);
  a.out = outs[2].data();
  const int borders[] = {0, 1, 17, 128, 129, 250, kLength};
  for (int i = 0; i < 6; i++) attend(a, table.data(), borders[i], borders[i + 1]);
  float most = 0;
  int differ = 0;
  for (size_t i = 0; i < outs[0].size(); i++) {
    const float apart = std::abs(to_float(outs[0][i]) - to_float(outs[1][i]));
    most = apart <= most ? most : apart;
    differ += outs[1][i].bits != outs[2][i].bits;
  }
  std::printf("%s%s, %d differ\n", most < 0.01f ? "near" : "apart", most > 0 ? "" : " to the bit", differ);
}

int main() {
  compare(32, 32, 0);
  compare(64, 64, 0);
  compare(64, 64, 100);
  compare(80, 48, 0);
  compare(7, 9, 0);
  compare(192, 128, 0);
}
"""


@pytest.mark.slow
def test_tiles_are_near_registers_and_give_the_same_bits_in_any_chunks(tmp_path):
    kernels = load_kernels()
    if kernels is None or not kernels._module.has_bf16_dot:
        pytest.skip("needs built kernels and a CPU with bfloat16 dot products")
    (tmp_path / "program.cpp").write_text(PROGRAM)
    flags = ["-std=c++17", "-O2", "-march=native", "-ffp-contract=off", "-Wno-psabi", "-include", EMULATION]
    sources = [tmp_path / "program.cpp", KERNELS / "prefill.cpp"]
    command = ["g++", *flags, f"-I{KERNELS}", *sources, "-o", tmp_path / "program"]
    subprocess.run(command, check=True, capture_output=True)
    assert subprocess.check_output([tmp_path / "program"], text=True).splitlines() == [
        "near to the bit, 0 differ",  # one tile deep, there is nothing to add up otherwise
        "near, 0 differ",
        "near, 0 differ",
        "near, 0 differ",
        "near to the bit, 0 differ",
        "near, 0 differ",
    ]
