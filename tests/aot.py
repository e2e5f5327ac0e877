"""Triton kernels compiled to cubins without a GPU, and what their machine code says.

    report = compile_kernel(kernel, {"x_ptr": "*bf16", "n": "i32"}, {"BLOCK": 128}, arch=90, num_warps=4, num_stages=2)
    report.check(arch=90)

Pointers count as 16-byte aligned, as torch's are, and so do the integers named in `aligned` (strides, widths): without
that the loads are not vectorised and the report means nothing.
"""

import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ARCHS = (80, 90)
SMEM_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # bytes one block may use
SMEM_PER_SM = {80: 164 * 1024, 89: 100 * 1024, 90: 228 * 1024}
REGS_PER_SM = 65536
OVERLAP = False  # of kernels that may overlap the one before them, unless a test says

needs_compiler = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="kernels defined under TRITON_INTERPRET=1 cannot be compiled"
)


@dataclass(frozen=True)
class Report:
    """Registers a thread, bytes of stack a thread and of shared memory a block, and counts of instructions."""

    name: str
    arch: int
    num_warps: int
    regs: int
    stack: int
    smem: int
    instructions: Counter[str]  # by opcode without its modifiers: HGMMA, HMMA, STL, ...
    mma_shapes: Counter[str]  # "64x128x16" of wgmma, "16816" of mma.sync
    load_bits: Counter[int]  # widths of the loads from global memory, plain (LDG) and asynchronous (LDGSTS)
    sass: str = field(repr=False)

    @property
    def spills(self) -> int:
        return self.instructions["STL"] + self.instructions["LDL"]

    @property
    def blocks_per_sm(self) -> int:
        """Blocks that registers, shared memory (1 KiB a block is the system's) and threads allow on one SM."""
        by_regs = REGS_PER_SM // (-(-self.regs // 8) * 8 * 32 * self.num_warps)
        return min(by_regs, SMEM_PER_SM[self.arch] // (self.smem + 1024), 2048 // (32 * self.num_warps))

    def check(self, *, matrix: bool = False) -> "Report":
        """Fail on a spill or on too much shared memory; with matrix=True also unless the tensor cores are used as the
        architecture wants: wgmma (HGMMA) and no mma.sync (HMMA) on sm_90, HMMA before it."""
        assert self.stack == self.spills == 0, f"{self}: spills"
        assert self.smem <= SMEM_LIMIT[self.arch], f"{self}: more shared memory than {SMEM_LIMIT[self.arch]} bytes"
        if matrix and self.arch == 90:
            assert self.instructions["HGMMA"] > 0, f"{self}: no wgmma"
            assert self.instructions["HMMA"] == 0, f"{self}: mma.sync beside wgmma"
        elif matrix:
            assert self.instructions["HMMA"] > 0, f"{self}: no tensor-core instruction"
        return self

    def __str__(self) -> str:
        matrix = {op: n for op, n in self.instructions.items() if op.endswith("MMA") or op in ("STL", "LDL")}
        return (
            f"{self.name} sm_{self.arch} w{self.num_warps}: {self.regs} regs, {self.stack} B stack, "
            f"{self.smem} B smem, {self.blocks_per_sm} blocks/SM, {matrix}, shapes {dict(self.mma_shapes)}, "
            f"loads {dict(self.load_bits)}"
        )


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    *,
    arch: int,
    num_warps: int,
    num_stages: int = 2,
    maxnreg: int | None = None,
    aligned: Collection[str] = (),
) -> Report:
    """Compile a @triton.jit kernel for sm_<arch>.

    signature: type of every argument that is not a constexpr ("*bf16", "*i32", "i32", "i64", "fp32"); a constexpr None
    is a pointer left out. aligned: the integer arguments that are multiples of 16.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(kernel.arg_names)
    if "OVERLAP" in names:
        constexprs = {"OVERLAP": OVERLAP} | dict(constexprs)
    odd = {n for n in names if (n in signature) == (n in constexprs)} | ({*signature, *constexprs} - set(names))
    assert not odd, f"{kernel.__name__}: give exactly one of signature and constexprs for {sorted(odd)}"
    source = ASTSource(
        fn=kernel,
        signature={n: signature.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): value for n, value in constexprs.items()},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, n in enumerate(names)
            if n in aligned or signature.get(n, "").startswith("*")
        },
    )
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    shown = ", ".join(f"{n}={v}" for n, v in constexprs.items())
    return read_cubin(
        compiled.asm["cubin"],
        f"{kernel.__name__}({shown})",
        arch,
        compiled.metadata.num_warps,
        compiled.metadata.shared,
    )


def read_cubin(cubin: bytes, name: str, arch: int, num_warps: int, smem: int) -> Report:
    """The report of one compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = subprocess.run([tool("cuobjdump"), "-res-usage", path], capture_output=True, text=True, check=True)
        sass = subprocess.run([tool("nvdisasm"), "-c", path], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
    assert found, f"{name}: cuobjdump reported no registers"
    instructions: Counter[str] = Counter()
    shapes: Counter[str] = Counter()
    load_bits: Counter[int] = Counter()
    for opcode in re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE):
        base, *modifiers = opcode.split(".")
        instructions[base] += 1
        if base.endswith("MMA"):
            shapes.update(m for m in modifiers if re.fullmatch(r"\d+x\d+x\d+|\d{4,}", m))
        if base in ("LDG", "LDGSTS"):
            load_bits[_bits(modifiers)] += 1
    return Report(name, arch, num_warps, int(found[1]), int(found[2]), smem, instructions, shapes, load_bits, sass)


def _bits(modifiers: list[str]) -> int:
    if "U8" in modifiers or "S8" in modifiers:
        return 8
    if "U16" in modifiers or "S16" in modifiers:
        return 16
    return next((int(m) for m in modifiers if m in ("64", "128")), 32)


@cache
def tool(name: str) -> str:
    """Triton's own copy of a CUDA binary tool, else the one on PATH."""
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    path = str(bundled) if bundled.exists() else shutil.which(name)
    if path is None:
        pytest.skip(f"no {name}: neither beside triton nor on PATH")
    return path
