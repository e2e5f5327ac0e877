"""`python -m mmfast.info` says what there is, and why the rest is not taken."""

import subprocess
import sys

import torch

from mmfast import __version__
from mmfast.info import report


def test_report_names_versions_builds_and_backends() -> None:
    text = report()
    assert f"mmfast {__version__}" in text
    assert f"torch {torch.__version__}" in text
    assert "CUDA C++" in text
    assert "attention on cpu" in text
    assert "cudnn refused: cuDNN needs a CUDA device, got cpu" in text


def test_runs_as_a_module() -> None:
    out = subprocess.run([sys.executable, "-m", "mmfast.info"], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert "392 tokens, d 64, bf16" in out.stdout


def test_forced_backend_is_explained(monkeypatch) -> None:
    monkeypatch.setenv("MMFAST_ATTENTION", "flash_attn")
    assert "MMFAST_ATTENTION refused" in report()
