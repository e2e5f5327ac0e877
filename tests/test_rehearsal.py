"""The GPU's path run without a GPU: every line of Python between a call and its kernels, on the shapes of real models."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
KERNELS = HERE.parent / "kernels" / "mmfast_kernels"
SCENES = ("ensemble", "host", "training", "pretraining", "fp8", "adapter", "evl", "m2clip", "measured_tables")
# Only for shapes that the copy engine cannot address, which no model has.
UNUSUAL = {"fp8_linear_kernel"}

pytest.importorskip("triton")


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA of its own")
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
def test_every_scene_runs_launches_every_kernel_and_agrees_with_the_fakes() -> None:
    """Each scene of rehearsal.py also checks that nothing waits for the device where it must not. One test: 20 s a run."""
    command = [sys.executable, str(HERE / "rehearse.py"), str(HERE / "rehearsal.py"), *SCENES]
    compiling = {**os.environ, "TRITON_INTERPRET": "0"}
    ran = subprocess.run(command, capture_output=True, text=True, env=compiling)
    assert ran.returncode == 0, ran.stderr[-4000:]
    seen = json.loads(ran.stdout.splitlines()[-1])
    sources = [p.read_text() for p in KERNELS.glob("*_triton.py")]
    written = {name for source in sources for name in re.findall(r"^def (\w+_kernel)\(", source, re.M)}
    assert written - set(seen["launches"]) == UNUSUAL
    assert seen["disagreements"] == []
