"""pytest-benchmark over every op of mmfast_kernels, on the GPU when there is one, else on the CPU.

    pytest benchmarks/bench_kernels.py --benchmark-columns=median,iqr --benchmark-json=kernels.json
    pytest benchmarks/bench_kernels.py --benchmark-compare

Each result carries its bytes, operations and rates in extra_info. A provider that is wrong is not timed. Calls below
about 100 us are better compared with run_all.py, which replays them from CUDA graphs.
"""

import functools
import time
from typing import Any

import pytest
import torch
from ops import Bench, all_ops

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = {
    "cpu": Bench(DEVICE, torch.float32, sequences=2, n=392, dim=384),
    "cuda": Bench(DEVICE, torch.bfloat16, sequences=86, n=392, dim=384),
}
OPS = all_ops(SIZES[DEVICE.type])
CASES = [
    pytest.param(index, name, id=f"{op.name}-{name}".replace(" ", ""))
    for index, op in enumerate(OPS)
    for name in op.providers
]


def synced() -> float:
    """Seconds, once everything asked of the device so far is done."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@functools.cache
def checked(index: int) -> tuple[dict[str, float], dict[str, str]]:
    return OPS[index].check()


@pytest.mark.parametrize(("index", "provider"), CASES)
@pytest.mark.benchmark(timer=synced, warmup=True, warmup_iterations=3, min_rounds=5, max_time=1.0)
def test_op(benchmark: Any, index: int, provider: str) -> None:
    op = OPS[index]
    errors, raised = checked(index)
    if provider in raised and not provider.startswith("mmfast"):
        pytest.skip(raised[provider])
    assert provider not in raised, raised[provider]
    found, allowed = errors[provider], op.allowed(errors)
    assert found <= allowed, f"{op.name} by {provider}: relative error {found:.2e}, allowed {allowed:.2e}; not timed"
    inputs = op.make()
    benchmark.group = f"{op.name} {op.shape} {SIZES[DEVICE.type].dtype}"
    with torch.no_grad():
        benchmark(op.providers[provider], *inputs)
    benchmark.extra_info |= {"bytes": op.bytes, "flops": op.flops, "error": found, "device": str(DEVICE)}
    if benchmark.stats is not None:
        median = benchmark.stats.stats.median
        benchmark.extra_info |= {"gb_s": op.bytes / median / 1e9, "tflop_s": op.flops / median / 1e12}
