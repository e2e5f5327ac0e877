"""Softmax attention inside each sequence of a pack.

    out_i = sum_j softmax_j(scale * q_i . k_j) v_j          lse_i = log sum_j exp(scale * q_i . k_j)

j runs over the keys of i's own sequence; causal: over those with j <= i + (keys - queries) of that sequence, so that
the last query sees the last key, as in flash-attn. A query that sees no key gets 0 (and lse -inf).
"""

from typing import Any

import torch
from torch import Tensor

from mmfast_kernels import backends
from mmfast_kernels.backends import Case, Lengths
from mmfast_kernels.dispatch import INTERPRET, register

# -- launcher and fake --


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    n_q: int,
    n_k: int,
    causal: bool,
    scale: float,
    with_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    at = Lengths(cu_q, cu_k, n_q, n_k)
    case = _case(q, k, v, at, causal, with_lse)
    if backend:
        backends.insist(backend, case)
    else:
        backend, _ = backends.choose(case)
    if backend == "triton":
        from mmfast_kernels import attention_triton

        return attention_triton.attention(q, k, v, cu_q, cu_k, n_q, n_k, causal, scale, with_lse)
    if with_lse:
        return _by_the_equations(q, k, v, at, causal, scale)
    return backends.run(backend, q, k, v, at, causal, scale), q.new_empty(0, dtype=torch.float32)


def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    n_q: int,
    n_k: int,
    causal: bool,
    scale: float,
    with_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    lse_shape = (q.shape[1], q.shape[0]) if with_lse else (0,)
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=torch.float32)


_op = register(
    "packed_attention(Tensor q, Tensor k, Tensor v, Tensor? cu_q, Tensor? cu_k, SymInt n_q, SymInt n_k, bool causal, "
    "float scale, bool with_lse, str backend) -> (Tensor, Tensor)",
    _attention,
    _attention_fake,
)


# -- public --


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    length: int | None = None,
    max_length: int | None = None,
    cu_seqlens_k: Tensor | None = None,
    length_k: int | None = None,
    max_length_k: int | None = None,
    causal: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention inside each sequence of a pack, q, k and v read where they lie.

    q: [T, H, d]. k, v: [Tk, H, d]. Any strides with a contiguous last dim, such as the views of a packed QKV product.
    Sequences: length, when each has that many tokens (T = S * length), and it wins; else cu_seqlens [S+1] int32, with
    max_length, a bound on the longest. The same with _k for keys of their own lengths (cross attention).
    causal: the last query of a sequence sees its last key. scale: d**-0.5 by default, above 0.
    backend: one of backends.NAMES; by default MMFAST_ATTENTION, else the table's choice, and torch for a gradient.
    Returns [T, H, d], contiguous, in q's dtype; rows behind the last sequence are undefined.
    ValueError (TypeError for a wrong type) names the argument that is wrong, or why the backend is refused.
    """
    at = _check(q, k, v, cu_seqlens, length, max_length, cu_seqlens_k, length_k, max_length_k)
    scale = _check_scale(scale, q.shape[2])
    wanted = backend or backends.forced()
    case = _case(q, k, v, at, causal, False)
    # SDPA itself where a gradient is wanted, and for one length on the CPU where our routine does not take it or
    # torch.compile can see through SDPA.
    dense_on_cpu = at.cu_q is None and not (q.is_cuda or INTERPRET)
    blocked = torch.compiler.is_compiling() or backends.refusal("cpp", case) is not None
    if case.needs_grad or (dense_on_cpu and wanted != "cpp" and (wanted is not None or blocked)):
        if wanted is not None:
            backends.insist(wanted, case)
        return backends.run(wanted or "torch", q, k, v, at, causal, scale)
    return _op(q, k, v, at.cu_q, at.cu_k, at.n_q, at.n_k, causal, scale, False, wanted or "")[0]


def packed_attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    length: int | None = None,
    max_length: int | None = None,
    cu_seqlens_k: Tensor | None = None,
    length_k: int | None = None,
    max_length_k: int | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """packed_attention, and the natural log of each query's sum of exponentials, [H, T] fp32 (fp64 for fp64).

    Without a Triton kernel for the case it is computed by the equations, sequence by sequence.
    """
    at = _check(q, k, v, cu_seqlens, length, max_length, cu_seqlens_k, length_k, max_length_k)
    scale = _check_scale(scale, q.shape[2])
    if _needs_grad(q, k, v):
        return _by_the_equations(q, k, v, at, causal, scale)
    return _op(q, k, v, at.cu_q, at.cu_k, at.n_q, at.n_k, causal, scale, True, "")


def packed_attention_ref(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """The specification of packed_attention (same options, no backend): see packed_attention_with_lse_ref."""
    return packed_attention_with_lse_ref(q, k, v, **options)[0]


def packed_attention_with_lse_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    length: int | None = None,
    max_length: int | None = None,
    cu_seqlens_k: Tensor | None = None,
    length_k: int | None = None,
    max_length_k: int | None = None,
    causal: bool = False,
    scale: float | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The equations, one sequence at a time, computed in dtype: by default fp32 (fp64 for fp64)."""
    at = _check(q, k, v, cu_seqlens, length, max_length, cu_seqlens_k, length_k, max_length_k)
    return _by_the_equations(q, k, v, at, causal, _check_scale(scale, q.shape[2]), dtype)


def _by_the_equations(
    q: Tensor, k: Tensor, v: Tensor, at: Lengths, causal: bool, scale: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    sequences = 0 if q.shape[0] == 0 or at.cu_q is not None else q.shape[0] // at.n_q
    q_starts, k_starts = (
        [n * i for i in range(sequences + 1)] if cu is None else cu.tolist()
        for cu, n in ((at.cu_q, at.n_q), (at.cu_k, at.n_k))
    )
    wide = dtype or torch.promote_types(q.dtype, torch.float32)
    outs, sums = [], []
    for i in range(len(q_starts) - 1):
        rows, keys = slice(q_starts[i], q_starts[i + 1]), slice(k_starts[i], k_starts[i + 1])
        qs, ks, vs = q[rows].to(wide), k[keys].to(wide), v[keys].to(wide)
        scores = torch.einsum("ihd,jhd->hij", qs, ks) * scale
        seen = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device)
        if causal:
            seen = seen.tril(ks.shape[0] - qs.shape[0])
        scores = scores.masked_fill(~seen, float("-inf"))
        blind = ~seen.any(1)
        weights = scores.masked_fill(blind[:, None], 0.0).softmax(-1).masked_fill(blind[:, None], 0.0)
        outs.append(torch.einsum("hij,jhd->ihd", weights, vs))
        sums.append(scores.logsumexp(-1))
    rest = q.shape[0] - q_starts[-1]
    outs.append(q.new_zeros(rest, *q.shape[1:], dtype=wide))
    sums.append(q.new_full((q.shape[1], rest), float("-inf"), dtype=wide))
    return torch.cat(outs).to(q.dtype), torch.cat(sums, 1).to(torch.promote_types(q.dtype, torch.float32))


# -- checks --


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _case(q: Tensor, k: Tensor, v: Tensor, at: Lengths, causal: bool, with_lse: bool) -> Case:
    row_stride = max(q.stride(0), k.stride(0), v.stride(0))
    needs_grad = _needs_grad(q, k, v)
    return Case(
        q.device, q.dtype, q.shape[2], at.n_q, at.n_k, at.cu_q is None, causal, needs_grad, with_lse, row_stride
    )


def _check_scale(scale: float | None, d: int) -> float:
    if scale is None:
        return d**-0.5
    if not scale > 0:
        raise ValueError(f"scale must be above 0, got {scale}")
    return float(scale)


def _check(
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
    n_q = _check_lengths("", q, cu, length, longest)
    if own_keys:
        n_k = _check_lengths("_k", k, cu_k, length_k, longest_k)
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


def _check_lengths(suffix: str, x: Tensor, cu: Tensor | None, length: int | None, longest: int | None) -> int:
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
