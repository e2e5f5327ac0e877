"""The gradient of q in packed attention, and what the gradients of k and v (attention_backward_triton.py) need beside it.

    p = exp(scale q k^T - lse)     delta = rowsum(out * dout) - dlse     ds = p * (dout v^T - delta)     dq = scale ds k

One program takes BLOCK_M queries of one head of one sequence, and walks over the keys as the forward kernel does.
"""

import triton
import triton.language as tl

from mmfast_kernels.attention_triton import LOG2_E, load_live

LOG2_E_: tl.constexpr = tl.constexpr(LOG2_E)


# -- kernels --


@triton.jit
def clear(
    x_ptr,  # [rows, H, d], strides x_row, x_head, 1: already at this head
    x_row,
    first,
    end,
    step,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,  # of a power of two
):
    """Zeros into a column of WIDTH, BLOCK rows every `step` rows."""
    at = tl.arange(0, BLOCK)[:, None] * x_row + tl.arange(0, WIDTH)[None, :]
    zeros = tl.zeros([BLOCK, WIDTH], x_ptr.dtype.element_ty)
    for row in tl.range(first, end, step, num_stages=1):
        tl.store(x_ptr + tl.cast(row, tl.int64) * x_row + at, zeros, mask=(row + tl.arange(0, BLOCK) < end)[:, None])


@triton.jit
def _dq_step(
    dq,  # [BLOCK_M, D_MAIN] fp32
    dq_rest,  # [BLOCK_M, D_REST or 16] fp32
    q,  # [BLOCK_M, D_MAIN]
    q_rest,  # [BLOCK_M, D_REST]
    dout,
    dout_rest,
    lse,  # [BLOCK_M] fp32, in units of log2
    delta,  # [BLOCK_M] fp32
    k_ptr,  # this head's first key
    v_ptr,
    k_row,
    v_row,
    offs_m,
    start,
    n_k,
    shift,
    scale_log2,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    cols = tl.arange(0, WIDTH)
    dims = tl.arange(0, D_MAIN)
    k_at = k_ptr + tl.cast(start, tl.int64) * k_row + cols[None, :] * k_row
    v_at = v_ptr + tl.cast(start, tl.int64) * v_row + cols[None, :] * v_row
    live = start + cols < n_k
    k = load_live(k_at + dims[:, None], live=live[None, :], MASKED=MASKED)
    v = load_live(v_at + dims[:, None], live=live[None, :], MASKED=MASKED)
    scores = tl.dot(q, k, input_precision=PRECISION)
    dp = tl.dot(dout, v, input_precision=PRECISION)
    if D_REST > 0:
        rest = D_MAIN + tl.arange(0, D_REST)
        k_rest = load_live(k_at + rest[:, None], live=live[None, :], MASKED=MASKED)
        v_rest = load_live(v_at + rest[:, None], live=live[None, :], MASKED=MASKED)
        scores = tl.dot(q_rest, k_rest, scores, input_precision=PRECISION)
        dp = tl.dot(dout_rest, v_rest, dp, input_precision=PRECISION)
    if MASKED:  # a key that is not there would weigh exp(-lse), which may be infinite
        seen = live[None, :]
        if CAUSAL:
            seen = seen & ((start + cols)[None, :] <= (offs_m + shift)[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    ds = (tl.exp2(scores * scale_log2 - lse[:, None]) * (dp - delta[:, None])).to(k.dtype)
    dq = tl.dot(ds, tl.trans(k), dq, input_precision=PRECISION)
    if D_REST > 0:
        dq_rest = tl.dot(ds, tl.trans(k_rest), dq_rest, input_precision=PRECISION)
    return dq, dq_rest


@triton.jit(do_not_specialize=["n_tokens", "n_q", "n_k", "tiles", "heads", "sequences"])
def dq_kernel(
    dout_ptr,  # [T, H, d], strides dout_row, dout_head, 1
    q_ptr,  # [T, H, d]
    k_ptr,  # [Tk, H, d]
    v_ptr,  # [Tk, H, d]
    out_ptr,  # [T, H, d] contiguous
    lse_ptr,  # [H, T] fp32, natural log
    dlse_ptr,  # [H, T] fp32, or None
    dq_ptr,  # [T, H, d]
    kept_ptr,  # [2, H, T] fp32: lse in units of log2, +inf for a query without keys, and delta
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
    dq_row,
    dq_head,
    n_tokens,  # T
    n_q,
    n_k,
    tiles,  # of BLOCK_M queries in the longest sequence
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
    m0 = (pid % tiles).to(tl.int32) * BLOCK_M
    dq_ptr += head * dq_head
    if VARLEN:
        first_q = tl.load(cu_q_ptr + sequence).to(tl.int64)
        if sequence == sequences:  # rows behind the last one
            clear(dq_ptr, dq_row, first_q + m0, n_tokens, tiles * BLOCK_M, BLOCK_M, D_MAIN)
            if D_REST > 0:
                clear(dq_ptr + D_MAIN, dq_row, first_q + m0, n_tokens, tiles * BLOCK_M, BLOCK_M, D_REST)
            return
        n_q = (tl.load(cu_q_ptr + sequence + 1) - first_q).to(tl.int32)
        first_k = tl.load(cu_k_ptr + sequence).to(tl.int64)
        n_k = (tl.load(cu_k_ptr + sequence + 1) - first_k).to(tl.int32)
    else:
        first_q = sequence * n_q
        first_k = sequence * n_k
    if m0 >= n_q:
        return

    offs_m = m0 + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, D_MAIN)
    lanes = tl.arange(0, BLOCK_M)
    first_q += m0
    live = offs_m < n_q
    row_live = live[:, None]
    width = heads * (D_MAIN + D_REST)
    q_at = q_ptr + first_q * q_row + head * q_head + lanes[:, None] * q_row
    dout_at = dout_ptr + first_q * dout_row + head * dout_head + lanes[:, None] * dout_row
    out_at = out_ptr + first_q * width + head * (D_MAIN + D_REST) + lanes[:, None] * width
    q = tl.load(q_at + dims[None, :], mask=row_live, other=0.0)
    dout = tl.load(dout_at + dims[None, :], mask=row_live, other=0.0)
    out = tl.load(out_at + dims[None, :], mask=row_live, other=0.0)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    q_rest = q
    dout_rest = dout
    if D_REST > 0:
        rest = D_MAIN + tl.arange(0, D_REST)[None, :]
        q_rest = tl.load(q_at + rest, mask=row_live, other=0.0)
        dout_rest = tl.load(dout_at + rest, mask=row_live, other=0.0)
        out_rest = tl.load(out_at + rest, mask=row_live, other=0.0)
        delta += tl.sum(out_rest.to(tl.float32) * dout_rest.to(tl.float32), 1)
    row = head * n_tokens + first_q + lanes
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row, mask=live, other=0.0)
    lse = tl.load(lse_ptr + row, mask=live, other=float("-inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E_)  # exp2(score - inf) is 0
    kept_at = kept_ptr + 2 * row[:, None] + tl.arange(0, 2)[None, :]
    tl.store(kept_at, tl.join(lse, delta), mask=row_live)

    k_ptr += first_k * k_row + head * k_head
    v_ptr += first_k * v_row + head * v_head
    dq = tl.zeros([BLOCK_M, D_MAIN], tl.float32)
    dq_rest = tl.zeros([BLOCK_M, D_REST if D_REST > 0 else 16], tl.float32)
    shift = n_k - n_q  # causal: the last query sees the last key
    if CAUSAL:
        full = tl.minimum(tl.maximum(m0 + shift + 1, 0), n_k) // BLOCK_N * BLOCK_N
        end = tl.minimum(m0 + BLOCK_M + shift, n_k)
    else:
        full = n_k // BLOCK_N * BLOCK_N
        end = n_k
    for j in tl.range(full, end, TAIL, num_stages=1):
        dq, dq_rest = _dq_step(
            dq, dq_rest, q, q_rest, dout, dout_rest, lse, delta, k_ptr, v_ptr, k_row, v_row, offs_m, j, n_k, shift,
            scale * LOG2_E_, D_MAIN, D_REST, TAIL, True, CAUSAL, PRECISION,
        )  # fmt: skip
    for j in tl.range(0, full, BLOCK_N):
        dq, dq_rest = _dq_step(
            dq, dq_rest, q, q_rest, dout, dout_rest, lse, delta, k_ptr, v_ptr, k_row, v_row, offs_m, j, n_k, shift,
            scale * LOG2_E_, D_MAIN, D_REST, BLOCK_N, False, CAUSAL, PRECISION,
        )  # fmt: skip

    dq_at = dq_ptr + first_q * dq_row + lanes[:, None] * dq_row
    tl.store(dq_at + dims[None, :], (dq * scale).to(dq_ptr.dtype.element_ty), mask=row_live)
    if D_REST > 0:
        at = dq_at + D_MAIN + tl.arange(0, D_REST)[None, :]
        tl.store(at, (dq_rest * scale).to(dq_ptr.dtype.element_ty), mask=row_live)
