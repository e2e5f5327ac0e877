"""Softmax attention inside each sequence of a pack.

    out_i = sum_j softmax_j(scale * q_i . k_j) v_j          lse_i = log sum_j exp(scale * q_i . k_j)

j runs over the keys of i's own sequence; causal: over those with j <= i + (keys - queries) of that sequence, so that
the last query sees the last key, as in flash-attn. A query that sees no key gets 0 (and lse -inf).

    ds_ij = p_ij (dout_i . v_j - dout_i . out_i + dlse_i)          p_ij = exp(scale * q_i . k_j - lse_i)
    dq_i = scale * sum_j ds_ij k_j       dk_j = scale * sum_i ds_ij q_i       dv_j = sum_i p_ij dout_i
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmfast_kernels import backends
from mmfast_kernels.attention_check import check, check_scale
from mmfast_kernels.backends import Case, Lengths
from mmfast_kernels.dispatch import INTERPRET, needs_grad, register

# -- launchers and fakes --


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
    if backend == "wgmma":
        from mmfast_kernels import attention_wgmma

        return attention_wgmma.forward(q, k, v, at, scale, with_lse)
    if with_lse and backend == "cpp" and q.numel() and k.numel():
        from mmfast_kernels import attention_cpp

        return attention_cpp.forward(q, k, v, at, causal, scale, with_lse=True)
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


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    n_q: int,
    n_k: int,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    at = Lengths(cu_q, cu_k, n_q, n_k)
    _write_gradients(dout, (q, k, v), out, lse, dlse, at, causal, scale, backend, (dq, dk, dv))
    return dq, dk, dv


def _backward_fake(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _self_backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu: Tensor | None,
    n: int,
    causal: bool,
    scale: float,
    backend: str,
) -> Tensor:
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    at = Lengths(cu, cu, n, n)
    _write_gradients(dout, qkv.unbind(1), out, lse, None, at, causal, scale, backend, dqkv.unbind(1))
    return dqkv


def _self_backward_fake(dout: Tensor, qkv: Tensor, *_: Any) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _write_gradients(
    dout: Tensor,
    qkv: tuple[Tensor, ...],
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    at: Lengths,
    causal: bool,
    scale: float,
    backend: str,
    grads: tuple[Tensor, ...],
) -> None:
    q, k, v = qkv
    dq, dk, dv = grads
    if backend == "triton":
        from mmfast_kernels import attention_backward_triton

        attention_backward_triton.attention_backward(
            dout, q, k, v, out, lse, dlse, at.cu_q, at.cu_k, at.n_q, at.n_k, causal, scale, dq, dk, dv
        )
    elif backend != "cpp" or dlse is not None:
        raise ValueError(f"backend must be triton, or cpp without a gradient of the log-sum-exp, got {backend}")
    elif q.numel() == 0 or k.numel() == 0:
        for x in grads:
            x.zero_()
    else:
        from mmfast_kernels import attention_cpp

        attention_cpp.backward(dout.contiguous(), q, k, v, out, lse, at, causal, scale, dq, dk, dv)


_op = register(
    "packed_attention(Tensor q, Tensor k, Tensor v, Tensor? cu_q, Tensor? cu_k, SymInt n_q, SymInt n_k, bool causal, "
    "float scale, bool with_lse, str backend) -> (Tensor, Tensor)",
    _attention,
    _attention_fake,
)
_backward_op = register(
    "packed_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dlse, "
    "Tensor? cu_q, Tensor? cu_k, SymInt n_q, SymInt n_k, bool causal, float scale, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_self_backward_op = register(
    "self_attention_backward(Tensor dout, Tensor qkv, Tensor out, Tensor lse, Tensor? cu, SymInt n, bool causal, "
    "float scale, str backend) -> Tensor",
    _self_backward,
    _self_backward_fake,
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor | None,
        cu_k: Tensor | None,  # None also where it is cu_q
        n_q: int,
        n_k: int,
        causal: bool,
        scale: float,
        backend: str,
        with_lse: bool,
    ) -> tuple[Tensor, ...]:
        cu_k = cu_q if cu_k is None else cu_k
        out, lse = _op(q, k, v, cu_q, cu_k, n_q, n_k, causal, scale, True, backend)
        ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k)
        ctx.options = n_q, n_k, causal, scale, backend
        ctx.set_materialize_grads(False)
        return (out, lse) if with_lse else (out,)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None = None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, cu_q, cu_k = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        grads = _backward_op(dout, q, k, v, out, lse, dlse, cu_q, cu_k, *ctx.options)
        needed = (grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad[:3], strict=True))
        return *needed, *[None] * 8


class _SelfAttention(torch.autograd.Function):
    """Of a packed product, so that its gradient is written in place and not put together from three."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cu: Tensor | None, n: int, causal: bool, scale: float, backend: str) -> Tensor:
        q, k, v = qkv.unbind(1)
        out, lse = _op(q, k, v, cu, cu, n, n, causal, scale, True, backend)
        ctx.save_for_backward(qkv, out, lse, cu)
        ctx.options = n, causal, scale, backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        qkv, out, lse, cu = ctx.saved_tensors
        return _self_backward_op(dout, qkv, out, lse, cu, *ctx.options), None, None, None, None, None


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
    backend: one of backends.NAMES; by default MMFAST_ATTENTION, else the table's choice.
    Returns [T, H, d], contiguous, in q's dtype; rows behind the last sequence are undefined, and their gradients 0.
    ValueError (TypeError for a wrong type) names the argument that is wrong, or why the backend is refused.
    """
    at = check(q, k, v, cu_seqlens, length, max_length, cu_seqlens_k, length_k, max_length_k)
    return _attend(q, k, v, at, causal, check_scale(scale, q.shape[2]), backend or backends.forced())


def packed_self_attention(
    qkv: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    length: int | None = None,
    max_length: int | None = None,
    causal: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """packed_attention of a packed QKV product, whose gradient comes back packed, without a copy.

    qkv: [T, 3, H, d], any strides with a contiguous last dim. The rest, and the result, as in packed_attention.
    """
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv must be [T, 3, H, d], got {tuple(qkv.shape)}")
    q, k, v = qkv.unbind(1)
    at = check(q, k, v, cu_seqlens, length, max_length, None, None, None)
    scale = check_scale(scale, qkv.shape[3])
    wanted = backend or backends.forced()
    case = _case(q, k, v, at, causal, False)
    if case.needs_grad:
        wanted = backends.choose_for_gradient(case, wanted)
        if wanted in backends.OWN_BACKWARD:
            return _SelfAttention.apply(qkv, at.cu_q, at.n_q, causal, scale, wanted)
    return _attend(q, k, v, at, causal, scale, wanted)


def _attend(q: Tensor, k: Tensor, v: Tensor, at: Lengths, causal: bool, scale: float, wanted: str | None) -> Tensor:
    case = _case(q, k, v, at, causal, False)
    if case.needs_grad:
        name = backends.choose_for_gradient(case, wanted)
        if name in backends.OWN_BACKWARD:
            return _trained(q, k, v, at, causal, scale, name, False)[0]
        return backends.run(name, q, k, v, at, causal, scale)
    # SDPA itself for one length on the CPU, where our routine does not take it or torch.compile can see through SDPA.
    dense_on_cpu = at.cu_q is None and not (q.is_cuda or INTERPRET)
    blocked = torch.compiler.is_compiling() or backends.refusal("cpp", case) is not None
    if dense_on_cpu and wanted != "cpp" and (wanted is not None or blocked):
        if wanted is not None:
            backends.insist(wanted, case)
        return backends.run(wanted or "torch", q, k, v, at, causal, scale)
    return _op(q, k, v, *at, causal, scale, False, wanted or "")[0]


def _trained(
    q: Tensor, k: Tensor, v: Tensor, at: Lengths, causal: bool, scale: float, backend: str, with_lse: bool
) -> tuple[Tensor, ...]:
    cu_k = None if at.cu_k is at.cu_q else at.cu_k
    if torch.compiler.is_compiling():  # which takes no tensor twice into a Function
        k, v = k.view_as(k), v.view_as(v)
    return _Attention.apply(q, k, v, at.cu_q, cu_k, at.n_q, at.n_k, causal, scale, backend, with_lse)


def _case(q: Tensor, k: Tensor, v: Tensor, at: Lengths, causal: bool, with_lse: bool) -> Case:
    row_stride = max(q.stride(0), k.stride(0), v.stride(0))
    grad, dense = needs_grad(q, k, v), at.cu_q is None
    # While torch.compile traces, the strides would become guards; the op asks again when it runs.
    aligned = torch.compiler.is_compiling() or _aligned(q, k, v)
    return Case(q.device, q.dtype, q.shape[2], at.n_q, at.n_k, dense, causal, grad, with_lse, row_stride, aligned)


def _aligned(*tensors: Tensor) -> bool:
    places = (n for x in tensors for n in (x.storage_offset(), x.stride(0), x.stride(1)))
    return all(n * tensors[0].element_size() % 16 == 0 for n in places)


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

    Both have gradients. Without a kernel for the case it is computed by the equations, sequence by sequence.
    """
    at = check(q, k, v, cu_seqlens, length, max_length, cu_seqlens_k, length_k, max_length_k)
    scale = check_scale(scale, q.shape[2])
    case = _case(q, k, v, at, causal, True)
    if case.needs_grad:
        name = backends.choose_for_gradient(case, backends.forced())
        if name in backends.OWN_BACKWARD:
            out, lse = _trained(q, k, v, at, causal, scale, name, True)
            return out, lse
        return _by_the_equations(q, k, v, at, causal, scale)
    return _op(q, k, v, *at, causal, scale, True, "")


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
    at = check(q, k, v, cu_seqlens, length, max_length, cu_seqlens_k, length_k, max_length_k)
    return _by_the_equations(q, k, v, at, causal, check_scale(scale, q.shape[2]), dtype)


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
