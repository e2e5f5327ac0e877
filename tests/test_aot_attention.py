"""Every shipped configuration of packed attention, forward and backward, compiled for sm_80 and sm_90."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from aot import ARCHS, Report, compile_kernel, needs_compiler

from mmfast_kernels import backends, tables

pytest.importorskip("triton")
from mmfast_kernels import attention_backward_triton, attention_triton

pytestmark = [pytest.mark.aot, needs_compiler]
SETTINGS = ("BLOCK_M", "BLOCK_N", "TAIL", "num_warps", "num_stages")


def compile_attention(arch: int, dtype: str, d: int, config: Mapping[str, Any], kind: str = "dense", tail: int = 16,
                      precision: str = "ieee") -> Report:  # fmt: skip
    main, rest = attention_triton.split_width(d)
    strides = ("q_row", "q_head", "k_row", "k_head", "v_row", "v_head")
    integers = (*strides, "n_tokens", "n_q", "n_k", "tiles", "heads")
    signature: dict[str, Any] = {f"{x}_ptr": f"*{dtype}" for x in ("q", "k", "v", "out")} | dict.fromkeys(
        integers, "i32"
    )
    signature |= {"lse_ptr": "*fp32", "scale_log2": "fp32"}
    varlen, causal = kind != "dense", kind == "causal"
    constexprs: dict[str, Any] = dict(
        D_MAIN=main, D_REST=rest, VARLEN=varlen, CAUSAL=causal, WITH_LSE=True, PRECISION=precision
    )
    constexprs |= dict(BLOCK_M=config["BLOCK_M"], BLOCK_N=config["BLOCK_N"], TAIL=config["TAIL"] if varlen else tail)
    (signature if varlen else constexprs).update(dict.fromkeys(("cu_q_ptr", "cu_k_ptr"), "*i32" if varlen else None))
    options = dict(num_warps=config["num_warps"], num_stages=config["num_stages"])
    return compile_kernel(attention_triton._fwd_kernel, signature, constexprs, arch=arch, aligned=strides, **options)


def shipped(arch: int, dtype: str) -> Iterator[tuple[int, tuple[int, ...], bool]]:
    """(d, config, is the first choice) for an architecture; a configuration taken at several lengths once."""
    for d in backends.TRITON_WIDTHS:
        found: dict[tuple[int, ...], bool] = {}
        for n in (392, 100_000):
            row = tables.lookup("packed_attention", arch=arch, dtype=dtype, d=d, n=n)
            for config in (row.config, *row.alternatives):
                key = tuple(config[name] for name in SETTINGS)
                found[key] = found.get(key, False) or config is row.config
        yield from ((d, key, first) for key, first in found.items())


@pytest.mark.parametrize(
    ("arch", "d", "settings", "kind"),
    [
        pytest.param(arch, d, settings, kind, id=f"sm_{arch}-d{d}-{'x'.join(map(str, settings))}-{kind}")
        for arch in ARCHS
        for d, settings, first in shipped(arch, "bf16")
        for kind in (
            ("dense", "mixed", "causal") if first and d == 64 else ("dense", "causal") if first else ("dense",)
        )
    ],
)
def test_half_precision(arch: int, d: int, settings: tuple[int, ...], kind: str) -> None:
    report = compile_attention(arch, "bf16", d, dict(zip(SETTINGS, settings, strict=True)), kind).check(matrix=True)
    assert report.load_bits[128] > report.load_bits.total() // 2, f"{report}: narrow loads"


@pytest.mark.parametrize("tail", [16, 32, 64])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_three_blocks_an_sm_for_the_usual_head(dtype: str, tail: int) -> None:
    """d 64 on sm_90, one length: what the predicted rate of short sequences rests on."""
    config = tables.lookup("packed_attention", arch=90, dtype=dtype, d=64, n=392).config
    report = compile_attention(90, dtype, 64, config, tail=tail).check(matrix=True)
    assert report.blocks_per_sm >= 3, report
    assert {"64x128x16", f"64x{tail}x16"} <= set(report.mma_shapes), report
    assert set(report.load_bits) == {128}, report


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("d", backends.TRITON_WIDTHS)
@pytest.mark.parametrize("arch", ARCHS)
def test_single_precision(arch: int, d: int, precision: str) -> None:
    config = tables.lookup("packed_attention", arch=arch, dtype="fp32", d=d, n=392).config
    report = compile_attention(arch, "fp32", d, config, "causal", precision=precision).check()
    assert (report.mma_shapes.total() > 0) == (precision == "tf32"), report


def test_a_spill_is_found() -> None:
    """The gate itself: four warps for 128 x 128 at d 128 do not fit the registers."""
    config = dict(BLOCK_M=128, BLOCK_N=128, TAIL=32, num_warps=4, num_stages=2)
    with pytest.raises(AssertionError, match="spills"):
        compile_attention(90, "bf16", 128, config).check()


# -- backward --

BACKWARD = {"dq": attention_backward_triton.dq_kernel, "dkdv": attention_backward_triton._dkdv_kernel}


def compile_backward(kernel: str, arch: int, dtype: str, d: int, config: Mapping[str, Any], kind: str = "dense",
                     precision: str = "ieee") -> Report:  # fmt: skip
    main, rest = attention_triton.split_width(d)
    varlen = kind != "dense"
    constexprs: dict[str, Any] = dict(D_MAIN=main, D_REST=rest, VARLEN=varlen, CAUSAL=kind == "causal")
    constexprs |= dict(PRECISION=precision) | {name: config[name] for name in ("BLOCK_M", "BLOCK_N", "TAIL")}
    types = {"lse_ptr": "*fp32", "dlse_ptr": "*fp32", "kept_ptr": "*fp32", "scale": "fp32"}
    types |= dict.fromkeys(("cu_q_ptr", "cu_k_ptr"), "*i32")
    signature: dict[str, Any] = {}
    for name in BACKWARD[kernel].arg_names:
        if name.startswith("cu_") and not varlen or name == "dlse_ptr" and kind != "mixed":
            constexprs[name] = None
        elif name not in constexprs:
            signature[name] = types.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
    aligned = [name for name in signature if name.endswith(("_row", "_head"))]
    options = dict(num_warps=config["num_warps"], num_stages=config["num_stages"])
    return compile_kernel(BACKWARD[kernel], signature, constexprs, arch=arch, aligned=aligned, **options)


def shipped_backward(kernel: str, arch: int, dtype: str) -> Iterator[tuple[int, tuple[int, ...], bool]]:
    for d in backends.TRITON_WIDTHS:
        row = tables.lookup("packed_attention_backward", kernel=kernel, arch=arch, dtype=dtype, d=d, n=392)
        for config in (row.config, *row.alternatives):
            yield d, tuple(config[name] for name in SETTINGS), config is row.config


@pytest.mark.parametrize(
    ("kernel", "arch", "d", "settings", "kind"),
    [
        pytest.param(
            kernel, arch, d, settings, kind, id=f"{kernel}-sm_{arch}-d{d}-{'x'.join(map(str, settings))}-{kind}"
        )
        for kernel in BACKWARD
        for arch in ARCHS
        for d, settings, first in shipped_backward(kernel, arch, "bf16")
        for kind in (("dense", "mixed", "causal") if first else ("dense", "causal"))
    ],
)
def test_backward_in_half_precision(kernel: str, arch: int, d: int, settings: tuple[int, ...], kind: str) -> None:
    config = dict(zip(SETTINGS, settings, strict=True))
    report = compile_backward(kernel, arch, "bf16", d, config, kind).check(matrix=True)
    assert report.load_bits[128] >= 4, f"{report}: narrow loads"
    assert report.load_bits[32] + report.load_bits[16] < 32, f"{report}: narrow loads"  # lengths, lse, dlse


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(("kernel", "blocks"), [("dq", 3), ("dkdv", 2)])
def test_backward_blocks_an_sm_for_the_usual_head(kernel: str, blocks: int, dtype: str) -> None:
    """d 64 on sm_90, one length, and every width of the masked step that dense lengths ask for."""
    config = tables.lookup("packed_attention_backward", kernel=kernel, arch=90, dtype=dtype, d=64, n=392).config
    for tail in (16, 32):
        report = compile_backward(kernel, 90, dtype, 64, {**config, "TAIL": tail}).check(matrix=True)
        assert report.blocks_per_sm >= blocks, report
        assert {"64x64x16", f"64x{tail}x16"} <= set(report.mma_shapes), report


def test_row_statistics_are_few_loads() -> None:
    """Loaded apart, lse and delta became a 4-byte copy for every element a thread holds of them in Triton 3.6."""
    config = tables.lookup("packed_attention_backward", kernel="dkdv", arch=90, dtype="bf16", d=64, n=392).config
    report = compile_backward("dkdv", 90, "bf16", 64, config)
    assert report.load_bits.total() - report.load_bits[128] <= 12, report


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("d", backends.TRITON_WIDTHS)
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", BACKWARD)
@pytest.mark.parametrize("kind", ["dense", "causal", "mixed"])
def test_backward_in_single_precision(kernel: str, arch: int, d: int, precision: str, kind: str) -> None:
    config = tables.lookup("packed_attention_backward", kernel=kernel, arch=arch, dtype="fp32", d=d, n=392).config
    report = compile_backward(kernel, arch, "fp32", d, config, kind, precision).check()
    assert (report.mma_shapes.total() > 0) == (precision == "tf32"), report
