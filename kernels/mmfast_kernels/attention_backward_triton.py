"""Flash attention over packed sequences, backward: the probabilities again from the saved lse, nothing [n, n] in memory.

    p = exp(scale q k^T - lse)     delta = rowsum(out * dout) - dlse     ds = p * (dout v^T - delta)
    dq = scale * ds k              dk = scale * ds^T q                   dv = p^T dout

Two kernels and no atomics, so that gradients are the same bits every time. The first (attention_dq_triton.py) owns a
block of queries of one head of one sequence, walks over the keys, and leaves lse and delta to the second, which owns a
block of keys and walks over the queries. As in the forward kernel, blocks come without any mask, and what is left over
first, in narrow masked steps: here it is the first queries, so that a causal diagonal and an odd length are one range.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast_kernels import tables
from mmfast_kernels.attention_dq_triton import LOG2_E_, clear, dq_kernel
from mmfast_kernels.attention_triton import load_live, split_width, tail_width
from mmfast_kernels.dispatch import tf32_allowed

# -- kernels --


@triton.jit
def _dkdv_step(
    dk,  # [BLOCK_N, D_MAIN] fp32
    dk_rest,  # [BLOCK_N, D_REST or 16] fp32
    dv,
    dv_rest,
    k,  # [BLOCK_N, D_MAIN]
    k_rest,  # [BLOCK_N, D_REST]
    v,
    v_rest,
    q_ptr,  # this head's first query
    dout_ptr,
    kept_ptr,  # of the first query
    q_row,
    dout_row,
    offs_n,
    start,
    end,
    shift,
    scale_log2,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows = tl.arange(0, WIDTH)
    dims = tl.arange(0, D_MAIN)
    q_at = q_ptr + tl.cast(start, tl.int64) * q_row + rows[None, :] * q_row
    dout_at = dout_ptr + tl.cast(start, tl.int64) * dout_row + rows[:, None] * dout_row
    kept_at = kept_ptr + 2 * (start + rows)[:, None] + tl.arange(0, 2)[None, :]
    live = start + rows < end
    q = load_live(q_at + dims[:, None], live=live[None, :], MASKED=MASKED)
    dout = load_live(dout_at + dims[None, :], live=live[:, None], MASKED=MASKED)
    if MASKED:  # a query that is not there: lse +inf, so that it weighs 0
        lse, delta = tl.split(tl.load(kept_at, mask=live[:, None], other=float("inf")))
        delta = tl.where(live, delta, 0.0)
    else:
        lse, delta = tl.split(tl.load(kept_at))
    scores = tl.dot(k, q, input_precision=PRECISION)
    if D_REST > 0:
        rest = D_MAIN + tl.arange(0, D_REST)
        q_rest = load_live(q_at + rest[:, None], live=live[None, :], MASKED=MASKED)
        dout_rest = load_live(dout_at + rest[None, :], live=live[:, None], MASKED=MASKED)
        scores = tl.dot(k_rest, q_rest, scores, input_precision=PRECISION)
    if MASKED and CAUSAL:
        scores = tl.where(offs_n[:, None] <= (start + rows + shift)[None, :], scores, float("-inf"))
    p = tl.exp2(scores * scale_log2 - lse[None, :])
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
    dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
    if D_REST > 0:
        dv_rest = tl.dot(p.to(dout.dtype), dout_rest, dv_rest, input_precision=PRECISION)
        dp = tl.dot(v_rest, tl.trans(dout_rest), dp, input_precision=PRECISION)
    ds = (p * (dp - delta[None, :])).to(q.dtype)
    dk = tl.dot(ds, tl.trans(q), dk, input_precision=PRECISION)
    if D_REST > 0:
        dk_rest = tl.dot(ds, tl.trans(q_rest), dk_rest, input_precision=PRECISION)
    return dk, dk_rest, dv, dv_rest


@triton.jit(do_not_specialize=["n_tokens", "n_tokens_k", "n_q", "n_k", "tiles", "heads", "sequences"])
def _dkdv_kernel(
    dout_ptr,  # [T, H, d], strides dout_row, dout_head, 1
    q_ptr,  # [T, H, d]
    k_ptr,  # [Tk, H, d]
    v_ptr,  # [Tk, H, d]
    kept_ptr,  # [2, H, T] fp32 of dq_kernel
    dk_ptr,  # [Tk, H, d]
    dv_ptr,  # [Tk, H, d]
    cu_q_ptr,  # [S + 1] int32, None when every sequence has n_q queries and n_k keys
    cu_k_ptr,  # [S + 1] int32
    dout_row,
    dout_head,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    dk_row,
    dk_head,
    dv_row,
    dv_head,
    n_tokens,  # T
    n_tokens_k,  # Tk
    n_q,
    n_k,
    tiles,  # of BLOCK_N keys in the longest sequence
    heads,
    sequences,
    scale,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    VARLEN: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,  # width of the masked steps
):
    pid = tl.program_id(0).to(tl.int64)
    head = (pid // tiles) % heads
    sequence = pid // tiles // heads
    n0 = (pid % tiles).to(tl.int32) * BLOCK_N
    dk_ptr += head * dk_head
    dv_ptr += head * dv_head
    if VARLEN:
        first_k = tl.load(cu_k_ptr + sequence).to(tl.int64)
        if sequence == sequences:  # rows behind the last one
            step = tiles * BLOCK_N
            clear(dk_ptr, dk_row, first_k + n0, n_tokens_k, step, BLOCK_N, D_MAIN)
            clear(dv_ptr, dv_row, first_k + n0, n_tokens_k, step, BLOCK_N, D_MAIN)
            if D_REST > 0:
                clear(dk_ptr + D_MAIN, dk_row, first_k + n0, n_tokens_k, step, BLOCK_N, D_REST)
                clear(dv_ptr + D_MAIN, dv_row, first_k + n0, n_tokens_k, step, BLOCK_N, D_REST)
            return
        n_k = (tl.load(cu_k_ptr + sequence + 1) - first_k).to(tl.int32)
        first_q = tl.load(cu_q_ptr + sequence).to(tl.int64)
        n_q = (tl.load(cu_q_ptr + sequence + 1) - first_q).to(tl.int32)
    else:
        first_q = sequence * n_q
        first_k = sequence * n_k
    if n0 >= n_k:
        return

    offs_n = n0 + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, D_MAIN)
    lanes = tl.arange(0, BLOCK_N)
    first_k += n0
    row_live = (offs_n < n_k)[:, None]
    k_at = k_ptr + first_k * k_row + head * k_head + lanes[:, None] * k_row
    v_at = v_ptr + first_k * v_row + head * v_head + lanes[:, None] * v_row
    k = tl.load(k_at + dims[None, :], mask=row_live, other=0.0)
    v = tl.load(v_at + dims[None, :], mask=row_live, other=0.0)
    k_rest = k
    v_rest = v
    if D_REST > 0:
        rest = D_MAIN + tl.arange(0, D_REST)[None, :]
        k_rest = tl.load(k_at + rest, mask=row_live, other=0.0)
        v_rest = tl.load(v_at + rest, mask=row_live, other=0.0)
    q_ptr += first_q * q_row + head * q_head
    dout_ptr += first_q * dout_row + head * dout_head
    kept_ptr += 2 * (head * n_tokens + first_q)

    dk = tl.zeros([BLOCK_N, D_MAIN], tl.float32)
    dv = tl.zeros([BLOCK_N, D_MAIN], tl.float32)
    dk_rest = tl.zeros([BLOCK_N, D_REST if D_REST > 0 else 16], tl.float32)
    dv_rest = tl.zeros([BLOCK_N, D_REST if D_REST > 0 else 16], tl.float32)
    shift = n_k - n_q  # causal: the last query sees the last key
    start = 0
    free = 0
    if CAUSAL:
        start = tl.maximum(n0 - shift, 0)  # the first query that sees any of these keys
        free = tl.minimum(tl.maximum(n0 + BLOCK_N - 1 - shift, 0), n_q)  # and the first that sees all
    full = n_q - (n_q - free) // BLOCK_M * BLOCK_M
    for i in tl.range(start, full, TAIL, num_stages=1):
        dk, dk_rest, dv, dv_rest = _dkdv_step(
            dk, dk_rest, dv, dv_rest, k, k_rest, v, v_rest, q_ptr, dout_ptr, kept_ptr, q_row, dout_row,
            offs_n, i, full, shift, scale * LOG2_E_, D_MAIN, D_REST, TAIL, True, CAUSAL, PRECISION,
        )  # fmt: skip
    for i in tl.range(full, n_q, BLOCK_M):
        dk, dk_rest, dv, dv_rest = _dkdv_step(
            dk, dk_rest, dv, dv_rest, k, k_rest, v, v_rest, q_ptr, dout_ptr, kept_ptr, q_row, dout_row,
            offs_n, i, n_q, shift, scale * LOG2_E_, D_MAIN, D_REST, BLOCK_M, False, CAUSAL, PRECISION,
        )  # fmt: skip

    dk_at = dk_ptr + first_k * dk_row + lanes[:, None] * dk_row
    dv_at = dv_ptr + first_k * dv_row + lanes[:, None] * dv_row
    tl.store(dk_at + dims[None, :], (dk * scale).to(dk_ptr.dtype.element_ty), mask=row_live)
    tl.store(dv_at + dims[None, :], dv.to(dv_ptr.dtype.element_ty), mask=row_live)
    if D_REST > 0:
        last = D_MAIN + tl.arange(0, D_REST)[None, :]
        tl.store(dk_at + last, (dk_rest * scale).to(dk_ptr.dtype.element_ty), mask=row_live)
        tl.store(dv_at + last, dv_rest.to(dv_ptr.dtype.element_ty), mask=row_live)


# -- launcher --


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    longest_q: int,
    longest_k: int,
    causal: bool,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Write dq [T, H, d], dk and dv [Tk, H, d], of any strides with a contiguous last dim.

    out and lse [H, T] fp32 (natural log) are the forward kernel's, dlse is the gradient of lse. Every row is written,
    those behind the last sequence with 0.
    """
    n_tokens, heads, d = q.shape
    if cu_q is None and (n_tokens == 0 or longest_q == 0):
        dk.zero_()
        dv.zero_()
        return
    if dout.stride(2) != 1 or dout.stride(0) >= 2**23:
        dout = dout.contiguous()
    out, lse = out.contiguous(), lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    kept = torch.empty((2, heads, n_tokens), dtype=torch.float32, device=q.device)
    sequences = n_tokens // longest_q if cu_q is None else cu_q.numel() - 1
    rows_of_programs = heads * (sequences + (cu_q is not None))  # one more for the rows behind the last sequence
    main, rest = split_width(d)
    exact = q.dtype == torch.float32 and not tf32_allowed()
    shared: dict[str, Any] = dict(D_MAIN=main, D_REST=rest, VARLEN=cu_q is not None, CAUSAL=causal)
    shared["PRECISION"] = "ieee" if exact else "tf32"
    strides = [stride for x in (dout, q, k, v) for stride in x.stride()[:2]]
    case: dict[str, Any] = dict(arch=tables.arch_of(q.device), dtype=tables.dtype_name(q.dtype), d=d)

    def settings(config: Mapping[str, Any], walked: int, block: str) -> dict[str, Any]:
        tail = config["TAIL"]
        if cu_q is None and not causal:
            tail = min(tail, tail_width(walked, config[block]))
        return {**shared, **config, "TAIL": tail}

    def launch_dq(config: Mapping[str, Any]) -> None:
        tiles = max(triton.cdiv(longest_q, config["BLOCK_M"]), 1)
        dq_kernel[(tiles * rows_of_programs,)](
            dout, q, k, v, out, lse, dlse, dq, kept, cu_q, cu_k, *strides, *dq.stride()[:2],
            n_tokens, longest_q, longest_k, tiles, heads, sequences, scale,
            **settings(config, longest_k, "BLOCK_N"),
        )  # fmt: skip

    def launch_dkdv(config: Mapping[str, Any]) -> None:
        tiles = max(triton.cdiv(longest_k, config["BLOCK_N"]), 1)
        _dkdv_kernel[(tiles * rows_of_programs,)](
            dout, q, k, v, kept, dk, dv, cu_q, cu_k, *strides, *dk.stride()[:2], *dv.stride()[:2],
            n_tokens, k.shape[0], longest_q, longest_k, tiles, heads, sequences, scale,
            **settings(config, longest_q, "BLOCK_M"),
        )  # fmt: skip

    with torch.cuda.device_of(q):
        launch_dq(tables.config("packed_attention_backward", launch_dq, kernel="dq", n=longest_k, **case))
        if k.shape[0]:
            launch_dkdv(tables.config("packed_attention_backward", launch_dkdv, kernel="dkdv", n=longest_q, **case))
