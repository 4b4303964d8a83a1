#!/usr/bin/env bash
# pyarrow 26.0.1.
#
# Python's memoryview of a buffer that Codec.compress returns has the length of the worst case, not that of the
# compressed bytes, while its own nbytes, the buffer's size and len are right. Whoever slices the view or takes its len
# takes bytes after the frame along, which mean nothing. numpy's frombuffer, to_pybytes and compress(..., asbytes=True)
# have the right length.
#
# Seen (zstd, 10,000 bytes of four values):
#   Buffer.size == len(Buffer) == memoryview.nbytes < len(memoryview): yes
#   numpy.frombuffer and to_pybytes as long as Buffer.size: yes
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check pyarrow==26.0.1 numpy==2.4.6
cat > "$work/run.py" <<'P'
import numpy
import pyarrow

data = numpy.random.default_rng(0).integers(0, 4, 10_000, numpy.uint8)
buffer = pyarrow.Codec("zstd").compress(data)
view = memoryview(buffer)
print("Buffer.size", buffer.size, "len(Buffer)", len(buffer), "nbytes", view.nbytes, "len(memoryview)", len(view))
is_longer = buffer.size == len(buffer) == view.nbytes < len(view)
are_right = len(numpy.frombuffer(buffer, numpy.uint8)) == len(buffer.to_pybytes()) == buffer.size
print("Buffer.size == len(Buffer) == memoryview.nbytes < len(memoryview):", "yes" if is_longer else "no")
print("numpy.frombuffer and to_pybytes as long as Buffer.size:", "yes" if are_right else "no")
assert is_longer and are_right
P
"$work/venv/bin/python" "$work/run.py"
