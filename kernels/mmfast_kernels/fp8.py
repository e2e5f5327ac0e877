"""Products in fp8 (e4m3) for inference: weights with a scale for every output channel, activations with one for every row.

    s_i = max_k |x_ik| / 448        q_ik = e4m3(x_ik / s_i)         of every row, as it comes
    t_j = max_k |w_jk| / 448        p_jk = e4m3(w_jk / t_j)         of every output channel, once
    y_ij = s_i t_j sum_k q_ik p_jk + b_j
    u_i = (|x_i| max_j |w_j| + max_j |b_j|) / 448,   e4m3(gelu(y_ij) / u_i)

The last line, in the product's own epilogue, makes the rows of the product after a GELU: a tile does not see the largest of a
whole row, but u_i bounds it (Cauchy and Schwarz; |gelu(y)| <= |y|), and the pass that makes q knows |x_i|. A scale that is too
large by 2^n costs an e4m3 number no digit, only the smallest of its 15 binades. A row with NaN or infinity has the scale NaN,
and is NaN throughout after the product.

The tensor cores of compute capability 8.9 and later multiply e4m3; those of 9.0 add a product's terms with 14 bits or so, below
the rounding of e4m3, 4 bits. Where no kernel runs, the references compute with the same rounded numbers, in fp32.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast_kernels import tables
from mmfast_kernels.dispatch import HAVE_TRITON, register, use_kernel
from mmfast_kernels.mlp import MODES, describable, gelu_ref, sm_count
from mmfast_kernels.norm import MAX_COLUMNS, dense_rows, geometry
from mmfast_kernels.overlap import launch_options

if HAVE_TRITON:
    from triton.tools.tensor_descriptor import TensorDescriptor

    from mmfast_kernels import fp8_triton

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST = 1e-30  # a row below it throughout is 0
ARCH = 89  # the first whose tensor cores multiply e4m3
STEP = 16  # inner and outer widths are multiples of it


class Fp8Rows(NamedTuple):
    """Rows of activations.   values: e4m3 [T, K].   scale: fp32 [T].   bound: fp32 [T], the scale of what a GELU makes of
    the product they are for, or None."""

    values: Tensor
    scale: Tensor
    bound: Tensor | None = None


class Fp8Weight(NamedTuple):
    """Weights of a linear layer.   values: e4m3 [N, K].   scale: fp32 [N].   bias: fp32 [N] or None.   bound: fp32 [2], the
    largest norm of an output channel and the largest bias."""

    values: Tensor
    scale: Tensor
    bias: Tensor | None
    bound: Tensor


class Norm(NamedTuple):
    """Of a LayerNorm.   weight, bias: [K]."""

    weight: Tensor
    bias: Tensor
    eps: float


# -- rows --------------------------------------------------------------------------------------------------------------


def _rows(
    x: Tensor, branch: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, bound: Tensor | None
) -> list[Tensor]:
    outputs = _rows_fake(x, branch, weight, bias, eps, bound)
    if not use_kernel(x):
        for out, made in zip(outputs, fp8_rows_ref(x, branch, weight, bias, eps, bound), strict=True):
            out.copy_(made)
        return outputs
    values, scale, *rest = outputs
    total = None if branch is None else rest.pop()
    x, branch = dense_rows(x), None if branch is None else dense_rows(branch)
    n_rows, d = x.shape
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))

    def run(config: Mapping[str, Any]) -> None:
        constants = geometry(d, config)
        fp8_triton.fp8_rows_kernel[(-(-n_rows // constants["ROWS"]),)](
            x, branch, weight, bias, bound, total, values, scale, rest[0] if rest else None,
            x.stride(0), 0 if branch is None else branch.stride(0), n_rows, eps, **constants, **launch_options(x.device),
        )  # fmt: skip

    if n_rows:
        with torch.cuda.device_of(x):
            run(tables.config("fp8_rows", run, d=d))
    return outputs


def _rows_fake(
    x: Tensor, branch: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, bound: Tensor | None
) -> list[Tensor]:
    outputs = [torch.empty(x.shape, dtype=E4M3, device=x.device)]
    outputs += [
        torch.empty(x.shape[:1], device=x.device, dtype=torch.float32) for _ in range(1 if bound is None else 2)
    ]
    return outputs if branch is None else [*outputs, torch.empty(x.shape, dtype=x.dtype, device=x.device)]


# Returns the rows, their scale, the scale by the bound where one is given, and the sum where there is a branch.
fp8_rows_op = register(
    "fp8_rows(Tensor x, Tensor? branch, Tensor? weight, Tensor? bias, float eps, Tensor? bound) -> Tensor[]",
    _rows,
    _rows_fake,
)


# -- product -----------------------------------------------------------------------------------------------------------


def launch(
    rows: Tensor,  # [M, K] e4m3
    scale: Tensor,  # [M]
    weight: Tensor,  # [N, K] e4m3
    weight_scale: Tensor,  # [N]
    bias: Tensor | None,  # [N]
    residual: Tensor | None,  # [M, N]
    gelu: str,
    out_scale: Tensor | None,  # [M]
    y: Tensor,  # [M, N]
    config: Mapping[str, Any],
) -> None:
    """One launch of the kernel that config names."""
    (m, k), n = rows.shape, weight.shape[0]
    bm, bn, bk = config["BM"], config["BN"], config["BK"]
    tiles = math.ceil(m / bm) * math.ceil(n / bn)
    options = {key: value for key, value in config.items() if key not in ("kernel", "blocks_per_sm")}
    options |= launch_options(y.device) | {"GELU": gelu, "APPROX": y.dtype != torch.float32 and y.is_cuda}
    rest = (scale, weight_scale, bias, out_scale, m, n, k)
    if config["kernel"] == "descriptor":
        x_desc, w_desc, y_desc = (
            TensorDescriptor.from_tensor(t, block)
            for t, block in ((rows, [bm, bk]), (weight, [bn, bk]), (y, [bm, bn // 2]))
        )
        residual_desc = None if residual is None else TensorDescriptor.from_tensor(residual, [bm, bn // 2])
        grid = (min(tiles, config["blocks_per_sm"] * sm_count(rows.device)),)
        fp8_triton.fp8_linear_descriptor_kernel[grid](x_desc, w_desc, y_desc, residual_desc, *rest, **options)
    else:
        fp8_triton.fp8_linear_kernel[(tiles,)](rows, weight, y, residual, *rest, EVEN_K=k % bk == 0, **options)


def _linear(
    rows: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gelu: str,
    out_scale: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    given = (rows, scale, weight, weight_scale, bias, residual, gelu, out_scale)
    if not use_kernel(rows):
        return fp8_linear_ref(*given, dtype)
    y = _linear_fake(*given, dtype)
    if y.numel():
        tiles = math.ceil(y.shape[0] / 128) * math.ceil(y.shape[1] / 128)
        residual = None if residual is None else residual.contiguous()
        matrices = (rows, weight, y) if residual is None else (rows, weight, y, residual)
        run = functools.partial(launch, rows, scale, weight, weight_scale, bias, residual, gelu, out_scale, y)
        with torch.cuda.device_of(rows):
            run(
                tables.config(
                    "fp8_linear",
                    run,
                    arch=tables.arch_of(rows.device),
                    descriptor=describable(*matrices),
                    small=tiles <= sm_count(rows.device),
                    out="fp8" if out_scale is not None else tables.dtype_name(dtype),
                )
            )
    return y


def _linear_fake(
    rows: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gelu: str,
    out_scale: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    shape = (rows.shape[0], weight.shape[0])
    return torch.empty(shape, dtype=dtype if out_scale is None else E4M3, device=rows.device)


fp8_linear_op = register(
    "fp8_linear(Tensor rows, Tensor scale, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor? residual, str gelu, "
    "Tensor? out_scale, ScalarType dtype) -> Tensor",
    _linear,
    _linear_fake,
)


# -- public ------------------------------------------------------------------------------------------------------------


def refusal(device: torch.device) -> str | None:
    """Why a device has no products in e4m3, or None. The CPU has them in emulation."""
    if device.type not in ("cpu", "cuda"):
        return f"fp8 runs on a GPU of NVIDIA's, and in emulation on the CPU, got {device}"
    if device.type == "cuda" and not HAVE_TRITON:
        return "fp8 needs Triton, which is not installed"
    arch = tables.arch_of(device)
    if device.type == "cuda" and arch < ARCH:
        return f"fp8 needs compute capability {ARCH / 10} or later, {device} has {arch / 10}"
    return None


def quantize_weight(weight: Tensor, bias: Tensor | None = None, gain: Tensor | None = None) -> Fp8Weight:
    """The e4m3 form of a linear layer, times `gain` of every output channel.

    weight: [N, K], floating, N and K multiples of 16. bias, gain: [N] or None. A channel with NaN or infinity has the scale
    NaN. Raises TypeError, ValueError.
    """
    for name, t, dims in (("weight", weight, 2), ("bias", bias, 1), ("gain", gain, 1)):
        if t is None:
            continue
        if not t.is_floating_point():
            raise TypeError(f"{name} takes a floating dtype, got {t.dtype}")
        if t.dim() != dims or t.shape[0] != weight.shape[0]:
            raise ValueError(f"{name} must be [N{', K' * (dims == 2)}], got {tuple(t.shape)}")
    if any(size % STEP or not size for size in weight.shape):
        raise ValueError(f"weight must be [N, K] in multiples of {STEP}, got {tuple(weight.shape)}")
    values, scale = _rounded(weight.detach().float())
    if gain is not None:
        scale = scale * gain.detach().float()
    if bias is not None:
        bias = bias.detach().float() * (1 if gain is None else gain.detach().float())
    norms = values.float().norm(dim=1) * scale.abs()
    bound = torch.stack((norms.max(), norms.new_zeros(()) if bias is None else bias.abs().max()))
    return Fp8Weight(values, scale, bias, bound)


def fp8_rows(
    x: Tensor, branch: Tensor | None = None, *, norm: Norm | None = None, before: Fp8Weight | None = None
) -> tuple[Fp8Rows, Tensor]:
    """The e4m3 rows of norm(x + branch), and x + branch in x's dtype, which without a branch is x.

    x, branch: [T, K], floating, K up to 16384. before: the weights whose product of these rows goes through a GELU into rows
    again. Without a gradient. Raises TypeError, ValueError.
    """
    if not x.is_floating_point():
        raise TypeError(f"fp8_rows: x takes a floating dtype, got {x.dtype}")
    if x.dim() != 2 or not 1 <= x.shape[1] <= MAX_COLUMNS:
        raise ValueError(f"fp8_rows: x takes [T, K] with K from 1 to {MAX_COLUMNS}, got {tuple(x.shape)}")
    if branch is not None and branch.shape != x.shape:
        raise ValueError(f"fp8_rows: branch takes x's shape {tuple(x.shape)}, got {tuple(branch.shape)}")
    _check_device(x.device)
    weight, bias, eps = norm or (None, None, 0.0)
    outputs = fp8_rows_op(x, branch, weight, bias, eps, None if before is None else before.bound)
    total = x if branch is None else outputs.pop()
    return Fp8Rows(*outputs), total


def fp8_linear(
    rows: Fp8Rows, weight: Fp8Weight, residual: Tensor | None = None, *, dtype: torch.dtype | None = None
) -> Tensor:
    """The product with its bias, plus the residual [T, N] where given.   Returns [T, N] in dtype, else the residual's, else
    fp32. Without a gradient. Raises ValueError."""
    _check_product(rows, weight)
    if residual is not None and residual.shape != (rows.values.shape[0], weight.values.shape[0]):
        raise ValueError(
            f"fp8_linear: residual takes {(rows.values.shape[0], weight.values.shape[0])}, got {tuple(residual.shape)}"
        )
    dtype = dtype or (torch.float32 if residual is None else residual.dtype)
    residual = residual if residual is None or residual.dtype == dtype else residual.to(dtype)
    return fp8_linear_op(rows.values, rows.scale, *weight[:3], residual, "none", None, dtype)


def fp8_linear_gelu(rows: Fp8Rows, weight: Fp8Weight, gelu: str = "tanh") -> Fp8Rows:
    """The e4m3 rows of gelu of a product, whose rows were made with before=weight.   gelu: as linear_gelu's mode; the tanh form
    is to e4m3 what the exact one is. Raises ValueError."""
    _check_product(rows, weight)
    if gelu not in MODES:
        raise ValueError(f"fp8_linear_gelu: gelu takes one of {MODES}, got {gelu!r}")
    if rows.bound is None:
        raise ValueError("fp8_linear_gelu: rows must be made with before=weight")
    values = fp8_linear_op(rows.values, rows.scale, *weight[:3], None, gelu, rows.bound, torch.float32)
    return Fp8Rows(values, rows.bound)


def _check_device(device: torch.device) -> None:
    fault = None if torch.compiler.is_compiling() else refusal(device)
    if fault is not None:
        raise ValueError(fault)


def _check_product(rows: Fp8Rows, weight: Fp8Weight) -> None:
    if rows.values.dim() != 2 or rows.values.shape[1] != weight.values.shape[1]:
        raise ValueError(
            f"rows take [T, {weight.values.shape[1]}] for a weight {tuple(weight.values.shape)}, "
            f"got {tuple(rows.values.shape)}"
        )
    if rows.values.device != weight.values.device:
        raise ValueError(f"rows are on {rows.values.device}, the weight on {weight.values.device}")
    _check_device(rows.values.device)


# -- references --------------------------------------------------------------------------------------------------------


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    most = x.abs().amax(1)
    scale = torch.where(most.isfinite(), most / LARGEST, torch.nan).masked_fill(most < SMALLEST, 0)
    return _to_e4m3(x, scale), scale


def _to_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    inverse = torch.where(scale > 0, 1 / scale, 0)
    return (x * inverse[:, None]).clamp(-LARGEST, LARGEST).to(E4M3)


def fp8_rows_ref(
    x: Tensor, branch: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, bound: Tensor | None
) -> list[Tensor]:
    """What the op returns, in plain torch, in fp32 or wider."""
    total = x if branch is None else (x + branch).to(x.dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = total.to(wide)
    if weight is not None:
        y = F.layer_norm(y, y.shape[1:], weight.to(wide), None if bias is None else bias.to(wide), eps)
    found = list(_rounded(y))
    if bound is not None:
        faults = torch.where(found[1].isfinite(), 0, torch.nan)
        found.append((y.norm(dim=1) * bound[0] + bound[1]) / LARGEST + faults)
    return found if branch is None else [*found, total]


def fp8_linear_ref(
    rows: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gelu: str,
    out_scale: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The op in plain torch, in the dtype of the scale."""
    wide = scale.dtype
    y = F.linear(rows.to(wide), weight.to(wide)) * scale[:, None] * weight_scale.to(wide)
    y = y if bias is None else y + bias.to(wide)
    y = y if gelu == "none" else gelu_ref(y, gelu)
    if out_scale is not None:
        return _to_e4m3(y, out_scale)
    return (y if residual is None else y + residual.to(wide)).to(dtype)
