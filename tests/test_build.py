"""The native module as it was built, and csrc under the sanitizers and under nvcc."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import aot
import pytest
import sanitize

from mmfast_kernels import _C

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
needs_cuda_build = pytest.mark.skipif(not _C.with_cuda, reason="built without CUDA")
needs_pybind11 = pytest.mark.skipif(importlib.util.find_spec("pybind11") is None, reason="setup.py needs pybind11")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def symbols() -> list[str]:
    """What the built module exports."""
    listed = subprocess.run(["nm", "-D", "--defined-only", _C.__file__], capture_output=True, text=True, check=True)
    return [line.split()[-1] for line in listed.stdout.splitlines()]


def with_setup(code: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Runs code beside setup.py, whose arguments to setuptools.setup are in `given`."""
    code = f"import setuptools; given = {{}}; setuptools.setup = given.update; import setup; {code}"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | settings, capture_output=True, text=True
    )


def test_imports_without_torch() -> None:
    code = "import sys; from mmfast_kernels import _C; assert 'torch' not in sys.modules; print(_C.device_count())"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) >= 0


def test_says_how_it_was_built() -> None:
    assert _C.build_info().startswith("host ")
    assert _C.with_cuda == ("nvcc" in _C.build_info())
    assert _C.with_cuda == bool(_C.cuda_archs)


def test_the_stub_names_what_the_module_has() -> None:
    stub = ast.parse((ROOT / "kernels" / "mmfast_kernels" / "_C.pyi").read_text())
    functions = {node.name for node in stub.body if isinstance(node, ast.FunctionDef)}
    constants = {
        node.target.id for node in stub.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    here = {name for name in dir(_C) if not name.startswith("__")}
    assert here - functions - constants == set()
    assert {name for name in functions | constants if not name.endswith("_cuda")} <= here


@needs_cuda_build
def test_no_cuda_symbol_or_library_is_shared_with_torch() -> None:
    """Two CUDA runtimes live in the process, torch's and ours: neither may bind to a symbol of the other."""
    assert [name for name in symbols() if re.match(r"_*(cu|cuda|nv)[A-Z_]", name)] == []
    assert "PyInit__C" in symbols()
    linked = subprocess.run(["ldd", _C.__file__], capture_output=True, text=True, check=True).stdout
    assert "cuda" not in linked


def test_only_the_binding_table_knows_python_and_nothing_knows_torch() -> None:
    for source in CSRC.rglob("*.*"):
        text = source.read_text()
        assert "torch/" not in text, source
        assert source.name == "bindings.cpp" or "pybind11" not in text, source


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("sanitizer", sanitize.SANITIZERS)
def test_host_routines_under_a_sanitizer(sanitizer: str) -> None:
    clean, said = sanitize.run(sanitizer)
    assert clean, said


@needs_nvcc
@pytest.mark.parametrize(
    ("source", "arch"),
    [
        (path.name, arch)
        for path in sorted(CSRC.rglob("*.cu"))
        for arch in (["90a"] if path.name == "attention_wgmma.cu" else ["80", "90"])
    ],
)
def test_no_kernel_spills(source: str, arch: str, tmp_path: Path) -> None:
    flags = ["-O3", "-std=c++17", "-Xptxas=-v,--warn-on-spills", f"-arch=sm_{arch}", "-DMMFAST_WITH_CUDA"]
    made = subprocess.run(
        ["nvcc", *flags, '-DMMFAST_CUDA_ARCHS=""', "-cubin", str(CSRC / "cuda" / source), "-o", str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", made.stderr)
    assert len(frames) == made.stderr.count("Compiling entry function")
    assert {frame for frame in frames if frame != ("0", "0", "0")} == set()
    assert "warning" not in made.stderr


@needs_nvcc
@pytest.mark.parametrize("kernel", ["lines_kernelIhhLi16ELb1E", "lines_kernelIffLi4ELb1E", "staged_kernelIhhLi16E"])
def test_the_gather_loads_16_bytes_at_a_time(kernel: str, tmp_path: Path) -> None:
    flags = ["-O3", "-std=c++17", "-arch=sm_90", "-DMMFAST_WITH_CUDA", "-cubin"]
    cubin = str(tmp_path / "gather.cubin")
    subprocess.run(["nvcc", *flags, str(CSRC / "cuda" / "gather.cu"), "-o", cubin], check=True)
    sass = subprocess.run([aot.tool("cuobjdump"), "-sass", cubin], capture_output=True, text=True, check=True).stdout
    (code,) = (part for part in sass.split("Function : ")[1:] if kernel in part.splitlines()[0])
    assert "LDG.E.128" in code
    assert "STG.E.128" in code


@needs_pybind11
@pytest.mark.parametrize(("name", "value"), [("MMFAST_CUDA", "yes"), ("MMFAST_CUDA_ARCHS", "hopper")])
def test_setup_refuses_settings_it_does_not_know(name: str, value: str) -> None:
    ran = with_setup("setup.find_nvcc(); setup.cuda_archs()", **{name: value})
    assert ran.returncode != 0
    assert f"{name}={value!r}" in ran.stderr


@needs_pybind11
@pytest.mark.parametrize(("archs", "found"), [("80;90", True), ("90a,100", True), ("80;89", False)])
def test_the_wgmma_kernel_is_built_where_its_architecture_is_asked_for(archs: str, found: bool) -> None:
    ran = with_setup("print(setup.has_hopper(setup.cuda_archs()))", MMFAST_CUDA_ARCHS=archs)
    assert ran.stdout.strip() == str(found), ran.stderr


@needs_pybind11
def test_every_source_file_of_csrc_is_built_or_shipped() -> None:
    ran = with_setup("ext = given['ext_modules'][0]; print(ext.sources + ext.depends)")
    assert ran.returncode == 0, ran.stderr
    listed = set(ast.literal_eval(ran.stdout))
    assert listed == {str(path.relative_to(ROOT)) for path in CSRC.rglob("*.*") if path.suffix in (".cpp", ".h")}
    assert "graft csrc" in (ROOT / "MANIFEST.in").read_text()


@needs_pybind11
@pytest.mark.skipif(importlib.util.find_spec("build") is None, reason="needs the package build")
def test_sdist_becomes_a_package_that_imports_without_torch(tmp_path: Path) -> None:
    """Host code only, as on a machine without nvcc; everything that the package needs has travelled in the sdist."""
    settings = os.environ | {"MMFAST_CUDA": "0"}
    make = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(make, check=True, capture_output=True, env=settings)
    (sdist,) = tmp_path.glob("mmfast-*.tar.gz")
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*install, "--target", str(site), str(sdist)], check=True, capture_output=True, env=settings)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from mmfast_kernels import _C; import mmfast; "
        "assert 'torch' not in sys.modules and not _C.with_cuda; print(_C.__file__, mmfast.__file__)"
    )
    ran = subprocess.run([sys.executable, "-I", "-c", code, str(site)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert all(path.startswith(str(site)) for path in ran.stdout.split())
    for folder in ("kernels/mmfast_kernels/tables", "mmfast"):
        for source in (ROOT / folder).rglob("*.[jp][sy]*"):
            inside = source.relative_to(ROOT / "kernels" if "kernels" in folder else ROOT)
            assert (site / inside).exists() or "__pycache__" in str(inside), inside
