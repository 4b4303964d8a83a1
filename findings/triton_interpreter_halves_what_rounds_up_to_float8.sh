#!/usr/bin/env bash
# triton 3.9.0 and 3.6.0, the interpreter on a CPU.
#
# A float32 that rounds up to the next power of two becomes half of it when it is converted to float8 (e4m3): the
# mantissa's carry is or-ed into the exponent, not added, and is lost where the exponent's last bit is set. 1.9375 gives
# 1.0, where torch, and a GPU, give 2.0. Ties go up, not to the even number (1.0625 gives 1.125), and what is beyond 448
# becomes 256. Numbers that float8 has exactly are converted right.
#
# Seen:
#   triton [1.5, 1.0, 1.125, 256.0]
#   torch  [1.5, 2.0, 1.0, 448.0]     of 1.5, 1.9375, 1.0625, 448 and more
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 triton==3.9.0 numpy==2.4.6
cat > "$work/run.py" <<'P'
import torch
import triton
import triton.language as tl


@triton.jit
def convert(numbers, out, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(out + place, tl.load(numbers + place).to(tl.float8e4nv))


numbers = torch.tensor([1.5, 1.9375, 1.0625, 500.0])
out = torch.zeros(4, dtype=torch.float8_e4m3fn)
convert[(1,)](numbers, out, SIZE=4)
print("triton", out.float().tolist())
print("torch ", numbers.clamp(max=448.0).to(torch.float8_e4m3fn).float().tolist())
P
said=$(TRITON_INTERPRET=1 "$work/venv/bin/python" "$work/run.py")
echo "$said"
[ "$said" = "triton [1.5, 1.0, 1.125, 256.0]
torch  [1.5, 2.0, 1.0, 448.0]" ]
