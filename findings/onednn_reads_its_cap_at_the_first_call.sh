#!/usr/bin/env bash
# torch 2.13.0 (its oneDNN), CPU build, x86-64.
#
# ONEDNN_MAX_CPU_ISA need not be there when the process starts: set from Python after `import torch` it still holds, for
# it is read at oneDNN's first call. Set after the first product that goes through oneDNN it does nothing, without a
# word. libtorch does not export oneDNN's own call for it, so the variable is the only way.
#
# Seen:
#   after import: isa:Intel SSE4.1
#   after the first product: isa:<what the CPU has>
#   exported: no
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$work/run.py" <<'P'
import ctypes, os, subprocess, sys, glob, pathlib
CODE = """
import os, sys, torch
if sys.argv[1] == "after import":
    os.environ["ONEDNN_MAX_CPU_ISA"] = "SSE41"
a = torch.ones(64, 64)
with torch.inference_mode():
    torch._C._nn.mkldnn_linear(a.to_mkldnn(), a, torch.zeros(64))
    if sys.argv[1] != "after import":
        os.environ["ONEDNN_MAX_CPU_ISA"] = "SSE41"
        torch._C._nn.mkldnn_linear(a.to_mkldnn(), a, torch.zeros(64))
"""
def isa(when):
    env = {k: v for k, v in os.environ.items() if k != "ONEDNN_MAX_CPU_ISA"} | {"ONEDNN_VERBOSE": "1"}
    done = subprocess.run([sys.executable, "-c", CODE, when], env=env, capture_output=True, text=True)
    lines = [l for l in (done.stdout + done.stderr).splitlines() if "isa:" in l]
    assert lines, done.stdout + done.stderr
    return lines[-1].rpartition("isa:")[2].strip()
capped, late = isa("after import"), isa("after the first product")
import torch
libraries = glob.glob(str(pathlib.Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
exported = any(hasattr(ctypes.CDLL(path), "dnnl_set_max_cpu_isa") for path in libraries)
print(f"after import: isa:{capped}")
print(f"after the first product: isa:{late}")
print(f"exported: {'yes' if exported else 'no'}")
assert "SSE4.1" in capped and "SSE4.1" not in late and not exported
P
"$work/venv/bin/python" "$work/run.py"
