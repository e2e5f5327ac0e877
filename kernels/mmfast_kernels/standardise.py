"""LayerNorm without its scale and shift, which the next product has taken in, behind an addition that is never stored.

    s = x + carry                            fp32, per row; carry [D] is the same for every row
    y = (s - mean(s)) * rstd(s)              rstd = 1 / sqrt(var(s) + eps)

One read of x and one write of y: carry stands for biases that were not added to the residual stream.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast_kernels import tables
from mmfast_kernels.dispatch import HAVE_TRITON, needs_grad, register, use_kernel
from mmfast_kernels.norm import MAX_COLUMNS, dense_rows, geometry, y_dtype
from mmfast_kernels.overlap import launch_options

if HAVE_TRITON:
    from mmfast_kernels import standardise_triton


def _fwd(x: Tensor, carry: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    y = _fwd_fake(x, carry, eps, dtype)
    x = dense_rows(x)
    n_rows, d = x.shape
    carry = None if carry is None else carry.contiguous()

    def run(config: Mapping[str, Any]) -> None:
        constants = geometry(d, config)
        standardise_triton.standardise_kernel[(-(-n_rows // constants["ROWS"]),)](
            x, carry, y, x.stride(0), n_rows, eps, **constants, **launch_options(x.device)
        )

    if n_rows:
        with torch.cuda.device_of(x):
            run(tables.config("norm", run, d=d))
    return y


def _fwd_fake(x: Tensor, carry: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


standardise_op = register(
    "standardise(Tensor x, Tensor? carry, float eps, ScalarType dtype) -> Tensor", _fwd, _fwd_fake
)


def standardise(
    x: Tensor, carry: Tensor | None = None, eps: float = 1e-6, *, dtype: torch.dtype | None = None
) -> Tensor:
    """(x + carry - mean) / standard deviation over the last dimension, the sum and its statistics in fp32.

    x: [..., D], D up to 16384. carry: [D] fp32 or x's dtype, or None. Returns [..., D] in dtype: autocast's where it is enabled,
    else x's, unless given. Where a gradient is asked for, the reference runs. Raises TypeError for a dtype that is not
    floating, ValueError for a wrong shape.
    """
    for name, kind in (
        ("x", x.dtype),
        ("dtype", dtype or x.dtype),
        ("carry", x.dtype if carry is None else carry.dtype),
    ):
        if not kind.is_floating_point:
            raise TypeError(f"standardise: {name} takes a floating dtype, got {kind}")
    if x.dim() < 1 or not 1 <= x.shape[-1] <= MAX_COLUMNS:
        raise ValueError(f"standardise: x takes [..., D] with D from 1 to {MAX_COLUMNS}, got {tuple(x.shape)}")
    if carry is not None and (carry.shape != x.shape[-1:] or carry.device != x.device):
        raise ValueError(
            f"standardise: carry takes [{x.shape[-1]}] on {x.device}, got {tuple(carry.shape)} on {carry.device}"
        )
    dtype = y_dtype(x, dtype)
    if not use_kernel(x, carry) or needs_grad(x, carry):
        return standardise_ref(x, carry, eps, dtype=dtype)
    return standardise_op(x, carry, eps, dtype)


def standardise_ref(
    x: Tensor, carry: Tensor | None = None, eps: float = 1e-6, *, dtype: torch.dtype | None = None
) -> Tensor:
    """standardise in plain torch."""
    dtype, d = dtype or x.dtype, x.shape[-1]
    if carry is not None or dtype != x.dtype:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
    if carry is not None:
        x = x + carry
    # Neutral parameters: on the CPU torch's LayerNorm takes twice as long without any.
    return F.layer_norm(x, (d,), x.new_ones(d), x.new_zeros(d), eps).to(dtype)
