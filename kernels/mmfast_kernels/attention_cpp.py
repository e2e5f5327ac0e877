"""Softmax attention and its backward by csrc/attention*.cpp: fp32 on the CPU, d up to 128 in steps of 16.

    out_i = sum_j p_ij v_j                               p_ij = exp(scale * q_i . k_j - lse_i)
    dv_j = sum_i p_ij dout_i                             ds_ij = p_ij * (dout_i . v_j - out_i . dout_i)
    dq_i = scale * sum_j ds_ij k_j                       dk_j = scale * sum_i ds_ij q_i

Neither depends on the number of threads, to the last bit.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmfast_kernels.native import _C, address, threads

if TYPE_CHECKING:
    from mmfast_kernels.backends import Lengths


def forward(
    q: Tensor, k: Tensor, v: Tensor, at: "Lengths", causal: bool, scale: float, with_lse: bool = False, widest: int = 64
) -> tuple[Tensor, Tensor]:
    """Attention inside each sequence, and its log-sum-exp.

    q [T, H, d], k, v [Tk, H, d]: fp32 with neighbouring elements in the last dimension. Gives out [T, H, d] and lse
    [H, T] fp32 (empty unless with_lse); both undefined behind the last sequence. Vector registers have `widest` bytes
    (16, 32 or 64) at most. ValueError for lengths that do not ascend within the tokens.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[1], q.shape[0]) if with_lse else 0, dtype=q.dtype, device=q.device)
    lse_at = address(lse) if with_lse else 0
    _C.attention(*_job(q, k, v, at, causal, scale), address(out), lse_at, threads(), widest)
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    at: "Lengths",
    causal: bool,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    widest: int = 64,
) -> None:
    """Writes the gradients of q, k and v to dq, dk, dv: all of their rows, with 0 behind the last sequence.

    dout, out [T, H, d] contiguous; lse [H, T] contiguous; q, k, v as forward had them; dq [T, H, d], dk, dv [Tk, H, d]
    fp32 with neighbouring elements in the last dimension, for example three slices of one [T, 3, H, d].
    """
    _C.attention_backward(
        *_job(q, k, v, at, causal, scale), address(dout), address(out), address(lse),
        address(dq), _layout(dq), address(dk), _layout(dk), address(dv), _layout(dv), threads(), widest,
    )  # fmt: skip


_Job = tuple[
    int, tuple[int, ...], int, tuple[int, ...], int, tuple[int, ...],
    int, int, int, int, int, int, int, bool, float,
]  # fmt: skip


def _job(q: Tensor, k: Tensor, v: Tensor, at: "Lengths", causal: bool, scale: float) -> _Job:
    """What both routines are first told."""
    if at.cu_q is not None:
        sequences = at.cu_q.shape[0] - 1
    else:
        sequences = q.shape[0] // at.n_q if at.n_q else 0
    return (
        address(q), _layout(q), address(k), _layout(k), address(v), _layout(v), address(at.cu_q), at.n_q,
        address(at.cu_k), at.n_k, sequences, q.shape[1], q.shape[2], causal, scale,
    )  # fmt: skip


def _layout(x: Tensor) -> tuple[int, ...]:
    return x.shape[0], x.stride(0), x.stride(1)
