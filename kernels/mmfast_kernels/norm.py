"""LayerNorm over the last dimension, alone or behind a residual add.

s = x + gamma * branch                          stored in x's dtype; gamma 1 where it is left out
y = (s - mean) * rstd * weight + bias           mean, rstd of s as stored, in fp32 per row
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast_kernels import tables
from mmfast_kernels.dispatch import HAVE_TRITON, register, use_kernel

if HAVE_TRITON:
    from mmfast_kernels import norm_triton

MAX_COLUMNS = 16384


def piece_columns(d: int, num_warps: int) -> int:
    """Columns of the pieces in which a row of d is held: few equal parts where d has them, else a masked tail."""
    widest = 256 * num_warps
    even = min(d & -d, widest)
    return even if even >= min(64, d) and 8 * even >= d else min(widest, 1 << (d - 1).bit_length())


def geometry(d: int, config: Mapping[str, Any]) -> dict[str, int]:
    """The kernel's constants for rows of d columns. One warp reads at least 256 columns at a time, 16 bytes a lane."""
    lanes = 32 * config["num_warps"]
    chunk = piece_columns(d, config["num_warps"])
    rows = max(config["elements"] * lanes // d, 256 // chunk, 1) if config["num_warps"] == 1 else 1
    return {"D": d, "CHUNK": chunk, "ROWS": 1 << (rows.bit_length() - 1), "num_warps": config["num_warps"]}


def _fwd(
    x: Tensor,  # [R, D]
    branch: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    stats: bool,
) -> list[Tensor]:
    n_rows, d = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    if branch is not None and branch.stride(1) != 1:
        branch = branch.contiguous()
    weight, bias = weight.contiguous(), bias.contiguous()
    gamma = None if gamma is None else gamma.contiguous()
    outputs = _outputs(x, branch, stats)
    y = outputs[0]
    total = outputs[1] if branch is not None else None
    mean, rstd = outputs[-2:] if stats else (None, None)

    def run(config: Mapping[str, Any]) -> None:
        constants = geometry(d, config)
        norm_triton.norm_kernel[(-(-n_rows // constants["ROWS"]),)](
            x, branch, gamma, weight, bias, total, y, mean, rstd,
            x.stride(0), 0 if branch is None else branch.stride(0), n_rows, eps, **constants,
        )  # fmt: skip

    if n_rows:
        with torch.cuda.device_of(x):
            run(tables.config("norm", run, d=d))
    return outputs


def _outputs(x: Tensor, branch: Tensor | None, stats: bool) -> list[Tensor]:
    outputs = [torch.empty(x.shape, dtype=x.dtype, device=x.device)]
    if branch is not None:
        outputs.append(torch.empty(x.shape, dtype=x.dtype, device=x.device))
    if stats:
        outputs += [torch.empty(x.shape[0], dtype=torch.float32, device=x.device) for _ in range(2)]
    return outputs


def _fwd_fake(
    x: Tensor, branch: Tensor | None, gamma: Tensor | None, weight: Tensor, bias: Tensor, eps: float, stats: bool
) -> list[Tensor]:
    return _outputs(x, branch, stats)


# Returns y, then s where there is a branch, then mean and rstd [R] fp32 where stats are asked for.
norm_op = register(
    "norm(Tensor x, Tensor? branch, Tensor? gamma, Tensor weight, Tensor bias, float eps, bool stats) -> Tensor[]",
    _fwd,
    _fwd_fake,
)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm over the last dimension, statistics in fp32.

    x: [..., D], D up to 16384. weight, bias: [D], x's dtype or another. Returns [..., D] in x's dtype.
    Raises TypeError for a dtype that is not floating, ValueError for a wrong shape.
    """
    _check("layer_norm", x, None, None, weight, bias)
    if not use_kernel(x, weight, bias):
        return layer_norm_ref(x, weight, bias, eps)
    return norm_op(x.reshape(-1, x.shape[-1]), None, None, weight, bias, eps, False)[0].view(x.shape)


def add_layer_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6, *, gamma: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Residual add and the LayerNorm that follows it: (s, y) with s = x + gamma * branch, y = LayerNorm(s).

    x: [..., D], D up to 16384. branch: x's shape, x's dtype or another. weight, bias, gamma: [D]; gamma is LayerScale.
    Returns s and y, both [..., D] in x's dtype; y is the norm of s as stored.
    Raises TypeError for a dtype that is not floating, ValueError for a wrong shape.
    """
    _check("add_layer_norm", x, branch, gamma, weight, bias)
    if not use_kernel(x, branch, gamma, weight, bias):
        return add_layer_norm_ref(x, branch, weight, bias, eps, gamma=gamma)
    d = x.shape[-1]
    y, total = norm_op(x.reshape(-1, d), branch.reshape(-1, d), gamma, weight, bias, eps, False)
    return total.view(x.shape), y.view(x.shape)


def _check(op: str, x: Tensor, branch: Tensor | None, gamma: Tensor | None, weight: Tensor, bias: Tensor) -> None:
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


def layer_norm_ref(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """layer_norm in plain torch."""
    on_cpu = x.device.type == "cpu" and weight.dtype == bias.dtype == torch.float32
    if x.dtype == weight.dtype == bias.dtype or (on_cpu and x.dtype in (torch.bfloat16, torch.float16)):
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    wide = torch.promote_types(x.dtype, torch.promote_types(weight.dtype, bias.dtype))
    return F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps).to(x.dtype)


def add_layer_norm_ref(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6, *, gamma: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """add_layer_norm in plain torch."""
    total = (x + (branch if gamma is None else branch * gamma)).to(x.dtype)
    return total, layer_norm_ref(total, weight, bias, eps)
