"""Run a program as on an H200, without one: see fake_gpu.py for what that means.

    python tests/rehearse.py [--compile] benchmarks/run_all.py --section attention --out FOLDER --device cuda
    python tests/rehearse.py [--compile] -m pytest -m gpu tests/test_norm.py

At the end a line of JSON says what was launched, read back, and where an op and its fake disagree. What the program then says
of speed and of errors means nothing: values do not exist. --compile also compiles every kernel, for sm_90, as launched.
"""

import ctypes
import importlib.util
import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "native" / "fake_cuda.cpp"


def load_device() -> None:
    """Before torch is imported, which asks once and for all whether there is CUDA."""
    spec = importlib.util.find_spec("torch")
    assert "torch" not in sys.modules
    assert spec is not None
    assert spec.origin is not None
    torch = Path(spec.origin).parent
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "fake_cuda.so"
        flags = [
            "-std=c++20",
            "-shared",
            "-fPIC",
            f"-I{torch / 'include'}",
            f"-L{torch / 'lib'}",
            "-lc10",
            "-ltorch_cpu",
        ]
        command = [os.environ.get("CXX", "g++"), str(SOURCE), "-o", str(library), *flags]
        subprocess.run(command, check=True)
        ctypes.CDLL(str(torch / "lib" / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def main(arguments: list[str]) -> None:
    load_device()
    sys.path.insert(0, str(HERE))
    import fake_gpu

    compiled = arguments[:1] == ["--compile"]
    arguments = arguments[compiled:]
    try:
        with fake_gpu.rehearsed(compiled):
            if arguments[0] == "-m":
                sys.argv = arguments[1:]
                runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
            else:
                sys.argv = arguments
                sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
                runpy.run_path(arguments[0], run_name="__main__")
    finally:
        sys.stdout.write(json.dumps(fake_gpu.seen()) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
