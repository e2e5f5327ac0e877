"""Products in int8 on the CPU: weights with a scale for every output channel, activations with one for every row.

    s_i = max_k |x_ik| / 127        q_ik = round(x_ik / s_i)        of every row, as it comes
    t_j = max_k |w_jk| / L          p_jk = round(w_jk / t_j)        of every output channel, once
    y_ij = s_i t_j sum_k q_ik p_jk + b_j                            the sum exact, in int32

The product is torch._int_mm (oneDNN on x86). Without VNNI instructions that adds pairs in int16, which 127 x 127 overflows:
where it does, L is 64 and not 127, and sums are exact again. What stands between two products, y and its residual, GELU or
LayerNorm, and the rounding of the next rows, is one pass in C++ (csrc/int8.cpp), or torch for widths that has no part in.
A row that holds NaN or infinity has the scale NaN, and is NaN throughout after the product.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mmfast_kernels.dispatch import register
from mmfast_kernels.native import _C, address, threads

LEVELS = 127
SAFE_LEVELS = 64  # 2 * 255 * 64 fits into int16
COLUMNS = 16  # csrc: a row's width is a multiple of it
SMALLEST = 1e-30  # csrc: a row below it throughout is 0
GELUS = {"none": 0, "erf": 1, "quick": 2}


class Int8Rows(NamedTuple):
    """Rows of activations.   values: int8 [T, K].   scale: fp32 [T]."""

    values: Tensor
    scale: Tensor


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """Weights of a linear layer.   values: int8 [N, K].   scale: fp32 [N].   bias: fp32 [N] or None."""

    values: Tensor
    scale: Tensor
    bias: Tensor | None


class Int8Product(NamedTuple):
    """A product before its scales.   sums: int32 [T, N].   row_scale: fp32 [T]."""

    sums: Tensor
    row_scale: Tensor
    weight: Int8Weight


class Norm(NamedTuple):
    """Of a LayerNorm.   weight, bias: fp32 [K]."""

    weight: Tensor
    bias: Tensor
    eps: float


# -- the pass in C++ ---------------------------------------------------------------------------------------------------


def _pass(
    source: Tensor,
    row_scale: Tensor | None,
    column_scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    gelu: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    total: Tensor | None,
    rows: Tensor | None,
    scale: Tensor | None,
    widest: int = 64,
) -> None:
    product = source.dtype == torch.int32
    if source.shape[1] % COLUMNS:
        given = (source, row_scale, column_scale, bias, residual, gelu, norm_weight, norm_bias, eps)
        for out, made in zip((total, rows, scale), int8_pass_ref(*given), strict=True):
            if out is not None:
                out.copy_(made)
        return
    count, width = source.shape
    _C.int8_pass(
        count, width, address(source) if product else 0, address(row_scale), address(column_scale), address(bias),
        0 if product else address(source), address(residual), address(total), GELUS[gelu], address(norm_weight),
        address(norm_bias), eps, address(rows), address(scale), threads(), widest,
    )  # fmt: skip


_pass_op = register(
    "int8_pass(Tensor source, Tensor? row_scale, Tensor? column_scale, Tensor? bias, Tensor? residual, str gelu, "
    "Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor(a!)? total, Tensor(b!)? rows, Tensor(c!)? scale) -> ()",
    _pass,
    lambda *given: None,
)


# -- public ------------------------------------------------------------------------------------------------------------


def quantize_weight(weight: Tensor, bias: Tensor | None = None, gain: Tensor | None = None) -> Int8Weight:
    """The int8 form of a linear layer, times `gain` of every output channel.

    weight: fp32 [N, K]. bias, gain: fp32 [N] or None. A channel with NaN or infinity has the scale NaN. Raises TypeError,
    ValueError.
    """
    for name, t, dims in (("weight", weight, 2), ("bias", bias, 1), ("gain", gain, 1)):
        if t is None:
            continue
        if t.dtype != torch.float32 or t.device.type != "cpu":
            raise TypeError(f"{name} must be fp32 on the CPU, got {t.dtype} on {t.device}")
        if t.dim() != dims or t.shape[0] != weight.shape[0]:
            raise ValueError(f"{name} must be [N{', K' * (dims == 2)}], got {tuple(t.shape)}")
    levels = LEVELS if sums_are_exact() else SAFE_LEVELS
    values = weight.detach()
    most = values.abs().amax(1) if values.shape[1] else values.new_zeros(values.shape[0])
    scale = torch.where(most.isfinite(), most / levels, torch.nan)
    rounded = (values / scale.where(scale > SMALLEST, 1)[:, None]).round_().nan_to_num_(0, 0, 0).to(torch.int8)
    scale = scale.masked_fill(scale <= SMALLEST, 0)
    if gain is not None:
        scale, bias = scale * gain.detach(), None if bias is None else bias.detach() * gain.detach()
    return Int8Weight(rounded, scale, None if bias is None else bias.detach().clone())


@functools.cache
def sums_are_exact() -> bool:
    """Whether torch._int_mm adds products of 127 x 127 without overflow on this processor."""
    a = torch.full((64, 384), LEVELS, dtype=torch.int8)
    return bool((torch._int_mm(a, a.t()) == 384 * LEVELS**2).all())


def multiply(rows: Int8Rows, weight: Int8Weight, out: Tensor | None = None) -> Int8Product:
    """The sums over k of a product.   out: int32, memory for at least T * N of them; made where it is None."""
    shape = (rows.values.shape[0], weight.values.shape[0])
    sums = torch.empty(shape, dtype=torch.int32) if out is None else out[: shape[0] * shape[1]].view(shape)
    if sums.numel() > 0:
        torch._int_mm(rows.values, weight.values.t(), out=sums)
    return Int8Product(sums, rows.scale, weight)


def to_float(source: Int8Product, residual: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """A product as fp32 [T, N], its bias and the residual [T, N] added.   out: where to write it, contiguous."""
    total = torch.empty(source.sums.shape) if out is None else out
    _pass_op(*_of(source), residual, "none", None, None, 0.0, total, None, None)
    return total


def to_rows(
    source: Tensor | Int8Product,
    residual: Tensor | None = None,
    *,
    gelu: str = "none",
    norm: Norm | None = None,
    total: Tensor | None = None,
) -> Int8Rows:
    """The int8 rows of norm(gelu(source + residual)).

    source: fp32 [T, K], or a product. residual: fp32 [T, K]. gelu: "none", "erf" (exact to 3e-7) or "quick" (CLIP's).
    total: fp32 [T, K] that takes source + residual; may be the residual. All contiguous. Raises ValueError, TypeError.
    """
    if gelu not in GELUS:
        raise ValueError(f"gelu takes one of {tuple(GELUS)}, got {gelu!r}")
    given = _of(source)
    for name, t in (("source", given[0]), ("residual", residual), ("total", total)):
        if t is None:
            continue
        if t.dtype != (torch.int32 if t is given[0] and given[1] is not None else torch.float32) or not t.is_cpu:
            raise TypeError(f"{name} must be fp32 on the CPU, got {t.dtype} on {t.device}")
        if t.shape != given[0].shape or not t.is_contiguous():
            raise ValueError(f"{name} must be contiguous {tuple(given[0].shape)}, got {tuple(t.shape)}")
    values = torch.empty(given[0].shape, dtype=torch.int8)
    scale = torch.empty(given[0].shape[0])
    weight, bias, eps = norm or (None, None, 0.0)
    _pass_op(*given, residual, gelu, weight, bias, eps, total, values, scale)
    return Int8Rows(values, scale)


def _of(source: Tensor | Int8Product) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    if isinstance(source, Tensor):
        return source, None, None, None
    return source.sums, source.row_scale, source.weight.scale, source.weight.bias


# -- references --------------------------------------------------------------------------------------------------------


def int8_pass_ref(
    source: Tensor,
    row_scale: Tensor | None,
    column_scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    gelu: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The pass in plain torch: total, int8 rows and their scale, in the dtype of the scales."""
    x = source
    if row_scale is not None and column_scale is not None:
        x = source.to(row_scale.dtype) * (row_scale[:, None] * column_scale)
        x = x if bias is None else x + bias
    x = total = x if residual is None else x + residual
    if gelu != "none":
        x = F.gelu(x) if gelu == "erf" else x * torch.sigmoid(1.702 * x)
    if norm_weight is not None:
        x = F.layer_norm(x, x.shape[1:], norm_weight, norm_bias, eps)
    most = x.abs().amax(1) if x.shape[1] else x.new_zeros(x.shape[0])
    scale = torch.where(most.isfinite(), most / LEVELS, torch.nan).masked_fill(most < SMALLEST, 0)
    rows = (x / scale.where(scale > 0, 1)[:, None]).round().nan_to_num(0, 0, 0).to(torch.int8)
    rows = rows.masked_fill(~(scale > 0)[:, None], 0)
    return total, rows, scale
