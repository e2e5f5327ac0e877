"""Softmax attention by csrc/cuda/attention_wgmma.cu: one length, d 64, fp16 and bf16, on GPUs of compute capability 9.0.

    out_i = sum_j p_ij v_j        p_ij = exp(scale * q_i . k_j - lse_i)        lse_i = log sum_j exp(scale * q_i . k_j)

K and V of a head lie whole in shared memory, so there are at most MOST_KEYS keys. A row's scores come in two chunks at
most; the weights are rounded to 16 bits before they meet V, sums and out are fp32 until the end.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmfast_kernels.native import _C, address, stream

if TYPE_CHECKING:
    from mmfast_kernels.backends import Lengths

MOST_KEYS = _C.max_wgmma_keys  # 0 where csrc was built without it


def forward(
    q: Tensor, k: Tensor, v: Tensor, at: "Lengths", scale: float, with_lse: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention inside each sequence, and its log-sum-exp in natural log.

    q [T, H, 64], k, v [Tk, H, 64]: fp16 or bf16, rows and heads at multiples of 16 bytes; at: lengths without cu. Gives out
    [T, H, 64] contiguous and lse [H, T] fp32 (empty unless with_lse). ValueError for rows that are not aligned,
    RuntimeError on another GPU.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if address(x) % 16 or x.stride(0) % 8 or x.stride(1) % 8:
            raise ValueError(f"{name} must have rows and heads at multiples of 16 bytes, got strides {x.stride()}")
    tokens, heads, d = q.shape
    out = torch.empty((tokens, heads, d), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, tokens) if with_lse else (0,), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    with torch.cuda.device_of(q):
        _C.attention_wgmma_cuda(
            address(q), q.stride()[:2], address(k), k.stride()[:2], address(v), v.stride()[:2], tokens // at.n_q, heads,
            at.n_q, at.n_k, scale, q.dtype == torch.bfloat16, address(out), address(lse) if with_lse else 0,
            stream(q.device),
        )  # fmt: skip
    return out, lse
