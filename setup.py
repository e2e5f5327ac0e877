"""Builds mmfast_kernels._C from csrc: C++ always, CUDA where nvcc is found. Needs no torch.

MMFAST_CUDA=auto|1|0      auto: CUDA if nvcc is there. 1: fail without it. 0: host code only.
MMFAST_CUDA_ARCHS="80;90"  compute capabilities; PTX of the newest serves later devices. attention_wgmma.cu is for 90 only.

nvcc runs through ninja, which rebuilds what changed; its objects stay in build/cuda, since pip's own build folder is
temporary.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from pybind11 import get_include
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CACHE = ROOT / "build" / "cuda"
HOST_SOURCES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.cpp"))
HEADERS = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.h"))
HOST_FLAGS = ["-O3", "-g0", "-std=c++17", "-pthread", "-Wall", "-Wextra", "-fvisibility=hidden", "-ffp-contract=off"]
HOPPER_ONLY = ("attention_wgmma.cu",)
NVCC_FLAGS = "-O3 -std=c++17 -lineinfo -Xptxas=-v,--warn-on-spills -Xcompiler=-fPIC,-fvisibility=hidden,-Wall"


def find_nvcc() -> str | None:
    wanted = os.environ.get("MMFAST_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"MMFAST_CUDA={wanted!r}: takes 0, 1 or auto")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if nvcc is None and wanted == "1":
        raise SystemExit(f"MMFAST_CUDA=1, but there is no nvcc on PATH or in {home}/bin")
    return nvcc


def cuda_archs() -> list[str]:
    archs = os.environ.get("MMFAST_CUDA_ARCHS", "80;90").replace(",", ";").split(";")
    if not all(re.fullmatch(r"\d{2,3}[af]?", arch) for arch in archs):
        raise SystemExit(f"MMFAST_CUDA_ARCHS={';'.join(archs)!r}: takes compute capabilities such as '80;90'")
    return sorted(archs, key=lambda arch: int(arch.rstrip("af")))


def library_dirs(nvcc: str) -> list[str]:
    """The toolkit's own, as nvcc would link: nvcc may be a link or a script far from its toolkit."""
    steps = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    libraries = next(line for line in steps.splitlines() if "LIBRARIES=" in line)
    return re.findall(r'"-L([^"]+)"', libraries)


def has_hopper(archs: list[str]) -> bool:
    return any(arch.rstrip("af") == "90" for arch in archs)


def compile_cuda(nvcc: str, archs: list[str]) -> list[str]:
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    if not has_hopper(archs):
        sources = [source for source in sources if source.name not in HOPPER_ONLY]
    objects = [CACHE / f"{source.stem}.o" for source in sources]
    flags = f"{NVCC_FLAGS} -DMMFAST_WITH_CUDA -DMMFAST_CUDA_ARCHS='\"{';'.join(archs)}\"'"
    rules = [
        f"codes = {' '.join(codes)}",
        "rule nvcc",
        f"  command = {nvcc} {flags} $codes -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    for out, source in zip(objects, sources, strict=True):
        rules.append(f"build {out}: nvcc {source}")
        if source.name in HOPPER_ONLY:
            rules.append("  codes = -gencode=arch=compute_90a,code=sm_90a")
    CACHE.mkdir(parents=True, exist_ok=True)
    (CACHE / "build.ninja").write_text("\n".join(rules) + "\n")
    subprocess.run([sys.executable, "-m", "ninja", "-C", str(CACHE)], check=True)
    return [str(out) for out in objects]


class Build(build_ext):
    def build_extension(self, ext: Extension) -> None:
        version = subprocess.run([*self.compiler.compiler_cxx, "--version"], capture_output=True, text=True, check=True)
        ext.define_macros = [("MMFAST_HOST_COMPILER", f'"{version.stdout.splitlines()[0]}"')]
        nvcc = find_nvcc()
        if nvcc:
            archs = cuda_archs()
            ext.define_macros.append(("MMFAST_WITH_CUDA", None))
            if has_hopper(archs):
                ext.define_macros.append(("MMFAST_WITH_WGMMA", None))
            ext.extra_objects = compile_cuda(nvcc, archs)
            ext.depends += ext.extra_objects  # else an edit of a .cu would not be linked
            ext.libraries = ["cudart_static", "dl", "rt"]
            ext.library_dirs = library_dirs(nvcc)
            # Hidden, so that this cudart and torch's own never bind to each other's symbols.
            ext.extra_link_args = [*ext.extra_link_args, "-Wl,--exclude-libs,ALL"]
        # setuptools compares times only: a file that changes with the settings makes it see them.
        stamp = ROOT / "build" / "settings.txt"
        settings = repr((ext.define_macros, HOST_FLAGS, ext.extra_objects))
        if not stamp.exists() or stamp.read_text() != settings:
            stamp.parent.mkdir(exist_ok=True)
            stamp.write_text(settings)
        ext.depends.append(str(stamp))
        super().build_extension(ext)


setup(
    packages=[*find_packages(include=["mmfast", "mmfast.*"]), "mmfast_kernels"],
    include_package_data=False,  # what package_data names, and nothing else
    package_dir={"": ".", "mmfast_kernels": "kernels/mmfast_kernels"},
    package_data={
        "mmfast_kernels": ["*.pyi", "py.typed", "tables/*.json"],
        "mmfast": ["py.typed", "stages/presets/*.yaml"],
    },
    ext_modules=[
        Extension(
            "mmfast_kernels._C",
            sources=HOST_SOURCES,
            depends=HEADERS,
            include_dirs=[get_include()],
            extra_compile_args=HOST_FLAGS,
            libraries=["dl"],
            extra_link_args=["-pthread"],
            language="c++",
        )
    ],
    cmdclass={"build_ext": Build},
)
