#!/usr/bin/env bash
# torch 2.13.0, CPU build, x86-64 with AVX-512.
#
# scaled_dot_product_attention in float32 on a CPU gives one query row, or three, other bits with two threads than with
# one: its flash kernel, which is what it takes by itself, shares the heads out between threads, and the heads of every
# thread but the first differ in the last place of a few elements. Two, four, five or eight rows are the same with any
# number of threads, as is everything through the MATH backend. So a test with a few rows says that the number of
# threads does not matter, and decoding, a row at a time, picks other tokens on another number of cores.
#
# Seen (differing elements of 16 heads of 64, one thread beside two; the counts vary by CPU):
#   FLASH_ATTENTION: 1 row some, 2 rows none, 3 rows some, 4 rows none, 5 rows none, 8 rows none
#   MATH: 1 row none, 2 rows none, 3 rows none, 4 rows none, 5 rows none, 8 rows none
#   by itself: 1 row some
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$work/run.py" <<'P'
import contextlib
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

torch.manual_seed(0)


def differing(rows, backend):
    query, key, value = (torch.randn(1, 16, length, 64) for length in (rows, 512, 512))
    outputs = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        with sdpa_kernel(backend) if backend else contextlib.nullcontext():
            outputs.append(scaled_dot_product_attention(query, key, value))
    return int((outputs[0] != outputs[1]).sum())


ROWS = (1, 2, 3, 4, 5, 8)
seen = {}
for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
    seen[backend.name] = {rows: differing(rows, backend) > 0 for rows in ROWS}
seen["by itself"] = {1: differing(1, None) > 0}
for name, differs in seen.items():
    words = (f"{rows} row{'s' if rows > 1 else ''} {'some' if some else 'none'}" for rows, some in differs.items())
    print(f"{name}: {', '.join(words)}")
assert seen["FLASH_ATTENTION"] == {rows: rows in (1, 3) for rows in ROWS}
assert not any(seen["MATH"].values())
assert seen["by itself"] == {1: True}
P
"$work/venv/bin/python" "$work/run.py"
