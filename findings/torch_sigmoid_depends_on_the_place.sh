#!/usr/bin/env bash
# torch 2.13.0, CPU build, x86-64 with AVX2 or AVX-512.
#
# sigmoid and silu of a float32 tensor give the same number other bits at the tensor's end than before it: whole
# vectors are computed by one routine, the elements that are left over one by one by another. So a row of a matrix may
# change in the last place with the number of rows beside it, which shows as other tokens where a model is to answer the
# same alone and in a batch. exp, tanh and erf do not: compositions of them give every place the same bits.
#
# Seen (how many of 20,000 numbers have other bits as the last of 65 elements than as the first; the counts vary by CPU):
#   sigmoid: some
#   silu: some
#   exp: none
#   tanh: none
#   erf: none
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$work/run.py" <<'P'
import torch
from torch.nn import functional

torch.set_num_threads(1)
numbers = 4 * torch.randn(20_000, generator=torch.Generator().manual_seed(0))
seen = {}
for name, function in (
    ("sigmoid", torch.sigmoid),
    ("silu", functional.silu),
    ("exp", torch.exp),
    ("tanh", torch.tanh),
    ("erf", torch.erf),
):
    differ = 0
    for number in numbers:
        out = function(number.repeat(65))
        differ += not torch.equal(out[:1], out[-1:])
    seen[name] = differ
    print(f"{name}: {'some' if differ else 'none'} ({differ})")
assert all(seen[name] > 0 for name in ("sigmoid", "silu"))
assert all(seen[name] == 0 for name in ("exp", "tanh", "erf"))
P
"$work/venv/bin/python" "$work/run.py"
