"""What is imported, and when: nobody waits for what is not used."""

import json
import subprocess
import sys

import pytest
import torch

from mmfast_kernels import backends

SCRIPT = """
import json, sys, time
import torch
before, start = set(sys.modules), time.process_time()
{statement}
spent = time.process_time() - start
print(json.dumps([spent, sorted(set(sys.modules) - before)]))
"""
HEAVY = [
    "lightning",
    "transformers",
    "av",
    "matplotlib",
    "sklearn",
    "PIL",
    "safetensors",
    "torchmetrics",
    "jsonargparse",
]


def imported(statement: str) -> tuple[float, set[str]]:
    """Seconds of processor time beyond torch's, and the modules that came in."""
    command = [sys.executable, "-c", SCRIPT.format(statement=statement)]
    spent, names = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return spent, set(names)


def test_import_mmfast_is_free() -> None:
    spent, names = imported("import mmfast")
    assert {name.split(".")[0] for name in names} == {"mmfast"}
    assert spent < 0.3


@pytest.mark.parametrize("name", ["MaskedViT", "CLIP", "MaskedAutoencoder", "tube_masks"])
def test_a_model_brings_in_its_kernels_and_no_more(name: str) -> None:
    _, names = imported(f"import mmfast; mmfast.{name}")
    assert not names.intersection([*HEAVY, "torch._dynamo", "torch._inductor"])


def test_arch_is_marked_as_torch_marks_a_constant() -> None:
    assert vars(backends._arch) == vars(torch.compiler.assume_constant_result(lambda: 0))
