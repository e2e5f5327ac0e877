"""What packed attention is given, checked; and the lengths of its sequences, brought to one form."""

import torch
from torch import Tensor

from mmfast_kernels.backends import Lengths


def check_scale(scale: float | None, d: int) -> float:
    """The scale, d**-0.5 for None; ValueError unless it is above 0."""
    if scale is None:
        return d**-0.5
    if not scale > 0:
        raise ValueError(f"scale must be above 0, got {scale}")
    return float(scale)


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu: Tensor | None,
    length: int | None,
    longest: int | None,
    cu_k: Tensor | None,
    length_k: int | None,
    longest_k: int | None,
) -> Lengths:
    """Where sequences begin; ValueError, TypeError for the options of packed_attention that do not fit."""
    if q.dim() != 3:
        raise ValueError(f"q must be [T, H, d], got {tuple(q.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.dim() != 3 or x.shape[1:] != q.shape[1:]:
            raise ValueError(f"{name} must be [Tk, H, d] with q's H and d, got {tuple(x.shape)} for q {tuple(q.shape)}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    if not q.dtype.is_floating_point:
        raise TypeError(f"q must be floating point, got {q.dtype}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(2) != 1 and x.shape[2] != 1:
            raise ValueError(f"{name} must have a contiguous last dim, got strides {x.stride()}")
    own_keys = cu_k is not None or length_k is not None
    n_q = _lengths("", q, cu, length, longest)
    if own_keys:
        n_k = _lengths("_k", k, cu_k, length_k, longest_k)
    else:
        if k.shape[0] != q.shape[0]:
            raise ValueError(
                f"k has {k.shape[0]} tokens and q {q.shape[0]}: length_k or cu_seqlens_k must say how keys are divided"
            )
        cu_k, length_k, n_k = cu, length, n_q
    cu, cu_k = (None if length is not None else cu), (None if length_k is not None else cu_k)
    if cu is None and cu_k is None:
        if q.shape[0] * n_k != k.shape[0] * n_q:
            raise ValueError(
                f"length_k must divide keys into as many sequences as length divides queries, got {n_k} for "
                f"{k.shape[0]} keys and {n_q} for {q.shape[0]} queries"
            )
        return Lengths(None, None, n_q, n_k)
    cu = _even_starts(q, n_q) if cu is None else cu
    cu_k = _even_starts(k, n_k) if cu_k is None else cu_k
    if cu.shape != cu_k.shape:
        raise ValueError(f"cu_seqlens_k must have one entry a sequence and one more, {len(cu)}, got {len(cu_k)}")
    return Lengths(cu, cu_k, n_q, n_k)


def _lengths(suffix: str, x: Tensor, cu: Tensor | None, length: int | None, longest: int | None) -> int:
    """The bound on a sequence's length."""
    if length is not None:
        if length < 0 or (x.shape[0] % length if length else x.shape[0]):
            raise ValueError(f"length{suffix} must divide the {x.shape[0]} tokens, got {length}")
        return length
    if cu is None:
        raise ValueError(f"length{suffix} or cu_seqlens{suffix} must be given, got neither")
    if cu.dtype != torch.int32:
        raise TypeError(f"cu_seqlens{suffix} must be int32, got {cu.dtype}")
    if cu.dim() != 1 or cu.shape[0] == 0 or not cu.is_contiguous():
        raise ValueError(f"cu_seqlens{suffix} must be contiguous [S+1], got {tuple(cu.shape)} strides {cu.stride()}")
    if cu.device != x.device:
        raise ValueError(f"cu_seqlens{suffix} must be on {x.device}, got {cu.device}")
    if longest is None or longest < 0:
        raise ValueError(f"max_length{suffix} must bound the longest sequence of cu_seqlens{suffix}, got {longest}")
    return longest


def _even_starts(x: Tensor, length: int) -> Tensor:
    return torch.arange(0, x.shape[0] + 1, max(length, 1), dtype=torch.int32, device=x.device)
