#!/usr/bin/env bash
# triton 3.9.0, its interpreter on a CPU.
#
# triton.knobs.runtime.interpret can be set at any time and reads back as set, and a kernel defined after that is
# interpreted. But functions of triton.language that are kernels' helpers themselves, such as cumsum, sum, max, sigmoid,
# were made for the compiler when triton was imported. A kernel that uses one then fails with "Cannot call @triton.jit'd
# outside of the scope of a kernel", which it does not do. With TRITON_INTERPRET=1 in the environment before the first
# import, which transformers may have done long before, the same kernel runs.
#
# Seen:
#   set after the import: knob True, kernel: InterpreterError outside of the scope of a kernel
#   in the environment:   knob True, kernel: [1, 3, 6, 10]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 triton==3.9.0 numpy==2.4.6
cat > "$work/run.py" <<'P'
import torch
import triton

triton.knobs.runtime.interpret = True
import triton.language as tl


@triton.jit
def running_total(numbers, totals, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(totals + place, tl.cumsum(tl.load(numbers + place), 0))


numbers = torch.tensor([1, 2, 3, 4], dtype=torch.int32)
totals = torch.zeros_like(numbers)
try:
    running_total[(1,)](numbers, totals, SIZE=4)
    seen = str(totals.tolist())
except Exception as error:
    part = "outside of the scope of a kernel"
    seen = f"{type(error).__name__} {part}" if part in str(error) else repr(error)
print(f"knob {triton.knobs.runtime.interpret}, kernel: {seen}")
P
late=$("$work/venv/bin/python" "$work/run.py")
early=$(TRITON_INTERPRET=1 "$work/venv/bin/python" "$work/run.py")
echo "set after the import: $late"
echo "in the environment:   $early"
[ "$late" = "knob True, kernel: InterpreterError outside of the scope of a kernel" ]
[ "$early" = "knob True, kernel: [1, 3, 6, 10]" ]
