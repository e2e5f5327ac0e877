"""Kernels compiled to overlap the one before them: they wait for it before they touch memory, and cost no registers.

griddepcontrol.wait is ACQBULK in machine code, griddepcontrol.launch_dependents PREEXIT.
"""

from collections.abc import Callable

import aot
import perf_kernels
import pytest
import test_aot_fp8
from aot import Report, needs_compiler

pytest.importorskip("triton")

from mmfast_kernels import tables

pytestmark = [pytest.mark.aot, needs_compiler]

MEMORY = ("LDG", "STG", "UTMALDG", "UTMASTG", "UBLKCP", "LDGSTS", "ATOM", "RED.")


def fp8_product() -> Report:
    config = tables.lookup("fp8_linear", arch=90, descriptor=True, small=False, out="bf16").config
    return test_aot_fp8.compile_linear(90, config, "gelu")


KERNELS: dict[str, Callable[[], Report]] = {
    "norm": lambda: perf_kernels.norm(384),
    "standardise": lambda: perf_kernels.standardise(384),
    "attention": lambda: perf_kernels.attention(392),
    "linear_gelu": lambda: perf_kernels.linear_gelu("tanh"),
    "linear_gelu, few rows": lambda: perf_kernels.linear_gelu("erf", small=True),
    "fp8 product": fp8_product,
    "fp8 rows": lambda: test_aot_fp8.compile_rows(90, 384, tables.lookup("fp8_rows", d=384).config),
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_waits_before_it_touches_memory(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = KERNELS[kernel]()
    monkeypatch.setattr(aot, "OVERLAP", True)
    report = KERNELS[kernel]().check()
    assert alone.instructions["ACQBULK"] == alone.instructions["PREEXIT"] == 0, alone
    assert report.instructions["ACQBULK"] == report.instructions["PREEXIT"] == 1, report
    before = report.sass[: report.sass.index("ACQBULK")]
    assert not any(access in before for access in MEMORY), before[-2000:]
    assert report.blocks_per_sm >= alone.blocks_per_sm, (alone, report)
