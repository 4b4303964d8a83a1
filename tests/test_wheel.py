"""A wheel brings what it was built with: compiled libraries for each baseline, of which a machine takes the best."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from engine.kernels.cpu.library import KERNELS
from kvrouter.index_library import INDEX
from transport.checksum_library import CHECKSUM
from transport.compiled import BASELINES, baselines_of, cpu_flags

ROOT = Path(__file__).parent.parent
HERE = baselines_of(platform.machine(), cpu_flags())

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

#: What an installed kvray finds: where it lies, its kernels, and the bits of a product and of an attention's result.
PROBE = """
import json, sys
import torch
import transport.compiled
flags = json.loads(sys.argv[1])
if flags is not None:
    transport.compiled.cpu_flags = lambda: flags
from engine.kernels.cpu.native import load_kernels
from kvrouter.opening import open_index
from transport.checksum import checksum, checksum_path
kernels = load_kernels()
found = {"where": transport.compiled.__file__, "index": type(open_index(lambda _: 1)).__name__}
found |= {"checksum_path": checksum_path(), "checksum": checksum(bytes(range(256)) * 100)}
found["kernels"] = None if kernels is None else kernels.name
if kernels is not None:
    generator = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(5, 96, generator=generator), torch.randn(1, 40, 96, generator=generator)
    out = kernels.linear(rows.bfloat16(), kernels.pack_weights(weight.bfloat16()), None, 40)
    norm = kernels.rms_norm(rows, torch.ones(96), 1e-5, adds_one=False, rounds_first=False)
    found["bits"] = [out.view(torch.int16).tolist(), norm.view(torch.int32).tolist()]
print(json.dumps(found))
"""


def build(directory: Path, **environment: str) -> Path:
    """Build a wheel of this tree; return it."""
    pytest.importorskip("hatchling", reason="hatchling is not installed: what builds wheels")
    wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(directory)]
    # A copy: pip leaves nothing in the tree, and nobody changes it meanwhile.
    tree = directory / "tree"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "__pycache__", "results")
    shutil.copytree(ROOT, tree, ignore=ignored)
    done = subprocess.run([*wheel, str(tree)], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = directory.glob("*.whl")
    return path


def installed(directory: Path, wheel: Path) -> Path:
    """Install `wheel` beside what is installed here; return the new environment's interpreter."""
    venv.create(directory, with_pip=False)
    python = directory / "bin" / "python"
    where = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], text=True
    )
    packages = Path(where.strip())
    # What is in .pth files of a folder that a .pth file names is not looked at: kvray's own tree does not come along.
    others = {str(Path(path)) for path in (*sysconfig.get_paths().values(), *sys.path) if path.endswith("-packages")}
    extra = [
        path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path).resolve() != ROOT
    ]
    (packages / "others.pth").write_text("\n".join(sorted(others) + extra) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    return python


def probed(python: Path, directory: Path, flags: list[str] | None = None) -> dict:
    """What PROBE finds in an environment without a compiler and with an empty cache, on a CPU of `flags`."""
    environment = {"PATH": str(python.parent), "HOME": str(directory), "XDG_CACHE_HOME": str(directory / "cache")}
    command = [python, "-c", PROBE, json.dumps(flags)]
    done = subprocess.run(command, env=environment, cwd=directory, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"log": done.stderr}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    if shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler")
    if platform.machine() not in BASELINES:
        pytest.skip(f"no baselines are known of {platform.machine()}")
    return build(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    return installed(tmp_path_factory.mktemp("venv"), wheel)


def test_a_wheel_has_each_library_for_each_baseline_and_fits_any_python(wheel):
    assert wheel.name.endswith(f"-cp311-abi3-{sysconfig.get_platform().replace('-', '_')}.whl")
    with zipfile.ZipFile(wheel) as archive:
        found = {Path(name).parts[2:] for name in archive.namelist() if name.startswith("transport/prebuilt/")}
    paths = [library.prebuilt(name) for library in (KERNELS, CHECKSUM, INDEX) for name in BASELINES[platform.machine()]]
    assert found == {path.parts[-2:] for path in paths}


def test_without_a_compiler_the_wheels_libraries_serve_with_the_bits_of_the_tree(python, tmp_path):
    found = probed(python, tmp_path)
    assert str(ROOT) not in found["where"]
    assert found["kernels"] is not None
    assert found["index"] == "CompiledIndex"
    assert found["checksum_path"] != "numpy"
    assert found["log"] == ""
    native = subprocess.check_output([sys.executable, "-c", PROBE, "null"], cwd=ROOT, text=True)
    same = ("checksum", "bits", "kernels", "checksum_path", "index")
    tree = json.loads(native)
    if tree["kernels"] is None:
        pytest.skip("kernels not built: python -m engine.kernels.cpu.build")
    assert {name: found[name] for name in same} == {name: tree[name] for name in same}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names baselines of x86-64")
@pytest.mark.parametrize(
    ("baseline", "name"), [("avx512-bf16", "native-16-"), ("avx512", "native-16"), ("avx2", "native-8")]
)
def test_a_cpu_gets_the_best_that_it_meets(python, tmp_path, baseline, name):
    if baseline not in HERE:
        pytest.skip(f"this CPU does not meet {baseline}")
    found = probed(python, tmp_path, sorted(BASELINES["x86_64"][baseline].cpu_flags))
    assert found["kernels"].startswith(name)
    assert (
        found["kernels"].startswith("native-16-bf16dot") == (baseline == "avx512-bf16") or "tiles" in found["kernels"]
    )


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names a baseline of x86-64")
def test_a_cpu_that_meets_none_is_served_slowly_and_told_how_to_mend_it(python, tmp_path):
    found = probed(python, tmp_path, ["sse4_2"])
    assert (found["kernels"], found["index"], found["checksum_path"]) == (None, "PlainIndex", "numpy")
    assert "python -m engine.kernels.cpu.build" in found["log"]


def test_a_wheel_that_was_built_without_a_compiler_is_for_any_machine(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    wheel = build(tmp_path, PATH=str(tools))
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith((".so", ".o"))]
        assert "engine/kernels/cpu/binding.cpp" in archive.namelist()
