"""LayerNorm over the last dimension, alone or behind a residual add.

s = x + gamma * branch                          stored in x's dtype; gamma 1 where it is left out
y = (s - mean) * rstd * weight + bias           mean, rstd of s as stored, in fp32 per row

Backward, with n = (s - mean) * rstd and g = dy * weight; the gradient of the residual stream is added in the same pass:
dx = ds + rstd * (g - n * mean(g * n) - mean(g))                    means over the row
dbranch = dx * gamma        dgamma = sum(dx * branch)               sums over the rows
dweight = sum(dy * n)       dbias = sum(dy)

It starts from the stored sum, so s, mean and rstd are all that a training step keeps.
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmfast_kernels import tables
from mmfast_kernels.dispatch import HAVE_TRITON, needs_grad, register, use_kernel
from mmfast_kernels.overlap import launch_options

if HAVE_TRITON:
    from mmfast_kernels import norm_backward_triton, norm_triton

MAX_COLUMNS = 16384


def piece_columns(d: int, num_warps: int, lane_columns: int = 8) -> int:
    """Columns of the pieces in which a row of d is held: few equal parts where d has them, else a masked tail."""
    widest = 32 * lane_columns * num_warps
    even = min(d & -d, widest)
    return even if even >= min(64, d) and 8 * even >= d else min(widest, 1 << (d - 1).bit_length())


def geometry(d: int, config: Mapping[str, Any]) -> dict[str, int]:
    """The forward's constants for rows of d columns. One warp reads at least 256 columns at a time, 16 bytes a lane."""
    lanes = 32 * config["num_warps"]
    chunk = piece_columns(d, config["num_warps"])
    rows = max(config["elements"] * lanes // d, 256 // chunk, 1) if config["num_warps"] == 1 else 1
    return {"D": d, "CHUNK": chunk, "ROWS": 1 << (rows.bit_length() - 1), "num_warps": config["num_warps"]}


def backward_geometry(d: int, fp32: bool, config: Mapping[str, Any]) -> dict[str, int]:
    """The backward's constants; fp32: whether any tensor of rows is.

    A lane holds 16 bytes of every piece, or 4 columns where some rows are fp32 and others narrower: then all of them
    have one layout, and nothing is exchanged between warps.
    """
    warps, lane_columns = config["row_warps"], 4 if fp32 else 8
    whole = min(32 * lane_columns * warps, 1 << (d - 1).bit_length())
    chunk = piece_columns(d, 1, lane_columns) if warps == 1 else whole
    rows = 32 * lane_columns * config["num_warps"] // chunk
    return {"D": d, "CHUNK": chunk, "ROWS": rows, "num_warps": config["num_warps"]}


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _fwd(
    x: Tensor,  # [..., D]
    branch: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    stats: bool,
) -> list[Tensor]:
    outputs = _outputs(x, branch, dtype, stats)
    x = dense_rows(x)
    n_rows, d = x.shape
    branch = None if branch is None else dense_rows(branch)
    weight, bias = weight.contiguous(), bias.contiguous()
    gamma = None if gamma is None else gamma.contiguous()
    y = outputs[0]
    total = outputs[1] if branch is not None else None
    mean, rstd = outputs[-2:] if stats else (None, None)

    def run(config: Mapping[str, Any]) -> None:
        constants = geometry(d, config)
        norm_triton.norm_kernel[(-(-n_rows // constants["ROWS"]),)](
            x, branch, gamma, weight, bias, total, y, mean, rstd,
            x.stride(0), 0 if branch is None else branch.stride(0), n_rows, eps, **constants, **launch_options(x.device),
        )  # fmt: skip

    if n_rows:
        with torch.cuda.device_of(x):
            run(tables.config("norm", run, d=d))
    return outputs


def dense_rows(x: Tensor) -> Tensor:
    """x [..., D] as [R, D] with columns one after another; rows may be apart."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _outputs(x: Tensor, branch: Tensor | None, dtype: torch.dtype, stats: bool) -> list[Tensor]:
    outputs = [torch.empty(x.shape, dtype=dtype, device=x.device)]
    if branch is not None:
        outputs.append(torch.empty(x.shape, dtype=x.dtype, device=x.device))
    if stats:
        outputs += [torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(2)]
    return outputs


def _fwd_fake(
    x: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    stats: bool,
) -> list[Tensor]:
    return _outputs(x, branch, dtype, stats)


def _bwd(
    ds: Tensor | None,  # [..., D]
    dy: Tensor,  # [..., D]
    s: Tensor,  # [..., D]
    branch: Tensor | None,  # [..., D] where dgamma is wanted
    gamma: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    bias_dtype: torch.dtype,
    branch_dtype: torch.dtype | None,
    wants_dx: bool,
    wants_params: bool,
) -> list[Tensor]:
    outputs = _gradients(ds, dy, s, branch, gamma, weight, mean, rstd, bias_dtype, branch_dtype, wants_dx, wants_params)
    ds, branch = (None if t is None else dense_rows(t) for t in (ds, branch))
    dy, s = dense_rows(dy), dense_rows(s)
    n_rows, d = s.shape
    weight, gamma = weight.contiguous(), None if gamma is None else gamma.contiguous()
    taken = iter(outputs)
    dx = next(taken).view(n_rows, d) if wants_dx else None
    dbranch = next(taken) if branch_dtype is not None else None
    sums = list(taken)  # dweight and dbias, dgamma
    fp32 = any(t is not None and t.dtype == torch.float32 for t in (ds, dy, s, branch, dx, dbranch))

    def run(config: Mapping[str, Any]) -> None:
        constants = backward_geometry(d, fp32, config)
        programs = min(-(-n_rows // constants["ROWS"]), config["programs"] * _multiprocessors(s.device))
        apart = config["apart"]
        fused = sums[:2] if apart and wants_params else [] if apart else sums
        partials = torch.empty((len(fused), programs, d), dtype=torch.float32, device=s.device) if fused else None

        def launch(dx: Tensor | None, dbranch: Tensor | None, branch: Tensor | None, params: bool) -> None:
            norm_backward_triton.norm_backward_kernel[(programs,)](
                ds, dy, s, branch, gamma, weight, mean, rstd, dx, dbranch, partials,
                0 if ds is None else ds.stride(0), dy.stride(0), s.stride(0),
                0 if branch is None else branch.stride(0), n_rows,
                PARAMS=params, DGAMMA=branch is not None, LAST=len(sums) - 1, **constants,
            )  # fmt: skip

        if apart:
            rows = torch.empty((n_rows, d), dtype=s.dtype, device=s.device) if dx is None and branch is not None else dx
            if rows is not None or dbranch is not None:
                launch(rows, dbranch, None, False)
            if wants_params:
                launch(None, None, None, True)
            if rows is not None and branch is not None:
                sums[-1].copy_((rows.float() * branch).sum(0))
        else:
            launch(dx, dbranch, branch, wants_params)
        if fused:
            norm_backward_triton.column_sums_kernel[(-(-d // 16), len(fused))](
                partials, *fused, *[None] * (3 - len(fused)), programs, D=d, ROWS=64, COLUMNS=16, num_warps=4
            )

    if n_rows:
        with torch.cuda.device_of(s):
            case = {"arch": tables.arch_of(s.device), "d": d, "gamma": branch is not None, "fp32": fp32}
            run(tables.config("norm_backward", run, **case))
    else:
        for total in sums:
            total.zero_()
    return outputs


def _gradients(
    ds: Tensor | None,
    dy: Tensor,
    s: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    bias_dtype: torch.dtype,
    branch_dtype: torch.dtype | None,
    wants_dx: bool,
    wants_params: bool,
) -> list[Tensor]:
    """Fresh memory for what _bwd returns; also its fake."""
    wanted = [(s.shape, s.dtype)] if wants_dx else []
    wanted += [(s.shape, branch_dtype)] if branch_dtype is not None else []
    wanted += [(weight.shape, weight.dtype), (weight.shape, bias_dtype)] if wants_params else []
    wanted += [(gamma.shape, gamma.dtype)] if branch is not None and gamma is not None else []
    return [torch.empty(shape, dtype=dtype, device=s.device) for shape, dtype in wanted]


# Returns y, then s where there is a branch, then mean and rstd [...] fp32 where stats are asked for.
norm_op = register(
    "norm(Tensor x, Tensor? branch, Tensor? gamma, Tensor weight, Tensor bias, float eps, ScalarType dtype, bool stats) "
    "-> Tensor[]",
    _fwd,
    _fwd_fake,
)
# Returns of dx, dbranch (with branch_dtype), dweight, dbias and dgamma (with branch) those that are wanted.
norm_backward_op = register(
    "norm_backward(Tensor? ds, Tensor dy, Tensor s, Tensor? branch, Tensor? gamma, Tensor weight, Tensor mean, "
    "Tensor rstd, ScalarType bias_dtype, ScalarType? branch_dtype, bool wants_dx, bool wants_params) -> Tensor[]",
    _bwd,
    _gradients,
)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor | None,
        gamma: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> Any:
        # Dynamo does not know the call: there unused outputs have zero gradients.
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)
        y, *total, mean, rstd = norm_op(x, branch, gamma, weight, bias, eps, dtype, True)
        ctx.bias_dtype = bias.dtype
        ctx.branch_dtype = None if branch is None else branch.dtype
        wanted = branch if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(total[0] if total else x, wanted, gamma, weight, mean, rstd)
        if total and not any(ctx.needs_input_grad[:3]):
            ctx.mark_non_differentiable(total[0])  # the norm's parameters have no part in the sum
        return (total[0], y) if total else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        s, branch, gamma, weight, mean, rstd = ctx.saved_tensors
        for_x, for_branch, for_gamma, for_weight, for_bias = ctx.needs_input_grad[:5]
        ds = cotangents[0] if len(cotangents) == 2 else None
        dy = cotangents[-1]
        dx = dbranch = dgamma = dweight = dbias = None
        if dy is not None:
            own = for_branch and (gamma is not None or ctx.branch_dtype != s.dtype)  # else dbranch is dx
            made = norm_backward_op(
                ds, dy, s, branch, gamma, weight, mean, rstd, ctx.bias_dtype, ctx.branch_dtype if own else None,
                for_x or (for_branch and not own), for_weight or for_bias,
            )  # fmt: skip
            taken = iter(made)
            dx = next(taken) if for_x or (for_branch and not own) else None
            dbranch = next(taken) if own else dx
            dweight, dbias = (next(taken), next(taken)) if for_weight or for_bias else (None, None)
            dgamma = next(taken) if for_gamma else None
        elif ds is not None:  # only the sum was used
            dx = ds
            dbranch = (ds if gamma is None else ds * gamma).to(ctx.branch_dtype) if for_branch else None
            dgamma = (ds.float() * branch).reshape(-1, len(gamma)).sum(0).to(gamma.dtype) if for_gamma else None
        return (
            dx if for_x else None,
            dbranch if for_branch else None,
            dgamma,
            dweight if for_weight else None,
            dbias if for_bias else None,
            None,
            None,
        )


def _run(x: Tensor, branch: Tensor | None, gamma: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    """(s, y) or (y,), by way of autograd only where it is wanted.   rest: weight, bias, eps, dtype."""
    if needs_grad(x, branch, gamma, *rest[:2]):
        made = _Norm.apply(x, branch, gamma, *rest)
        return made if branch is not None else (made,)
    outputs = norm_op(x, branch, gamma, *rest, False)
    return tuple(reversed(outputs))


def y_dtype(x: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is not None:
        return dtype
    device = x.device.type
    if device == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6, *, dtype: torch.dtype | None = None
) -> Tensor:
    """LayerNorm over the last dimension, statistics in fp32.

    x: [..., D], D up to 16384. weight, bias: [D], x's dtype or another.
    Returns [..., D] in dtype: autocast's where it is enabled, else x's, unless given.
    Raises TypeError for a dtype that is not floating, ValueError for a wrong shape.
    """
    _check("layer_norm", x, None, None, weight, bias, dtype)
    dtype = y_dtype(x, dtype)
    if not use_kernel(x, weight, bias):
        return layer_norm_ref(x, weight, bias, eps, dtype=dtype)
    return _run(x, None, None, weight, bias, eps, dtype)[0]


def add_layer_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    *,
    gamma: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Residual add and the LayerNorm that follows it: (s, y) with s = x + gamma * branch, y = LayerNorm(s).

    x: [..., D], D up to 16384. branch: x's shape, x's dtype or another. weight, bias, gamma: [D]; gamma is LayerScale.
    Returns s in x's dtype, and y, the norm of s as stored, in dtype: autocast's where it is enabled, else x's, unless
    given. Both [..., D]. Raises TypeError for a dtype that is not floating, ValueError for a wrong shape.
    """
    _check("add_layer_norm", x, branch, gamma, weight, bias, dtype)
    dtype = y_dtype(x, dtype)
    if not use_kernel(x, branch, gamma, weight, bias):
        return add_layer_norm_ref(x, branch, weight, bias, eps, gamma=gamma, dtype=dtype)
    total, y = _run(x, branch, gamma, weight, bias, eps, dtype)
    return total, y


def _check(
    op: str,
    x: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    dtype: torch.dtype | None,
) -> None:
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"{op}: dtype takes a floating dtype, got {dtype}")
    if x.dim() < 1 or not 1 <= x.shape[-1] <= MAX_COLUMNS:
        raise ValueError(f"{op}: x takes [..., D] with D from 1 to {MAX_COLUMNS}, got {tuple(x.shape)}")
    d = x.shape[-1]
    named = {"x": x, "branch": branch, "gamma": gamma, "weight": weight, "bias": bias}
    for name, tensor in named.items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} takes a floating dtype, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, x on {x.device}")
        if name in ("gamma", "weight", "bias") and tensor.shape != (d,):
            raise ValueError(f"{op}: {name} takes [{d}], got {tuple(tensor.shape)}")
    if branch is not None and branch.shape != x.shape:
        raise ValueError(f"{op}: branch takes x's shape {tuple(x.shape)}, got {tuple(branch.shape)}")


def layer_norm_ref(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6, *, dtype: torch.dtype | None = None
) -> Tensor:
    """layer_norm in plain torch; dtype: x's unless given."""
    dtype = x.dtype if dtype is None else dtype
    on_cpu = x.device.type == "cpu" and weight.dtype == bias.dtype == torch.float32
    wide = torch.promote_types(x.dtype, torch.promote_types(weight.dtype, bias.dtype))
    if on_cpu and x.dtype == dtype and x.dtype in (torch.bfloat16, torch.float16):
        return F.layer_norm(x, weight.shape, weight, bias, eps)  # torch's CPU kernel takes fp32 parameters
    if dtype.itemsize > x.dtype.itemsize:
        wide = torch.promote_types(wide, dtype)
    return F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps).to(dtype)


def add_layer_norm_ref(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    *,
    gamma: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """add_layer_norm in plain torch; dtype: x's unless given."""
    total = (x + branch if gamma is None else torch.addcmul(x, branch, gamma)).to(x.dtype)
    return total, layer_norm_ref(total, weight, bias, eps, dtype=dtype)
