"""Where the test of an op runs its kernel: in the interpreter on the CPU, and on a GPU in every dtype."""

import pytest
import torch

gpu, interpret = pytest.mark.gpu, pytest.mark.interpret
# (device, dtype)
KERNEL = [
    pytest.param("cpu", torch.float32, id="interpreter-fp32", marks=interpret),
    pytest.param("cpu", torch.float16, id="interpreter-fp16", marks=interpret),
    *[pytest.param("cuda", t, marks=gpu) for t in (torch.float32, torch.float16, torch.bfloat16)],
]
BOTH = ["plain", pytest.param("kernel", marks=interpret)]
