"""Flash attention over packed sequences, forward.

    s = scale * q k^T      p = exp(s - max s)      out = p v / sum p      lse = max s + log sum p

One program takes BLOCK_M queries of one head of one sequence. Keys come in blocks of BLOCK_N without any mask; what is
left over (the tail of a sequence, the diagonal of a causal tile) comes first, in narrow masked steps: at the usual
392 = 3 * 128 + 8 tokens a 16-wide tail step wastes 8 keys where a fourth block would waste 120. The exponential is
exp2 with scale * log2(e) folded into one multiply-add. A head width that is no power of two is split: 80 = 64 + 16.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast_kernels import tables
from mmfast_kernels.dispatch import tf32_allowed
from mmfast_kernels.overlap import launch_options
from mmfast_kernels.overlap_triton import begin

LOG2_E = math.log2(math.e)
LN_2: tl.constexpr = tl.constexpr(math.log(2.0))
NARROWEST = 16  # keys of the narrowest step that the matrix units take


# -- kernels --


@triton.jit
def load_live(at, live, MASKED: tl.constexpr):
    """A block whose dead elements are 0; without MASKED all are alive."""
    return tl.load(at, mask=live, other=0.0) if MASKED else tl.load(at)


@triton.jit
def _step(
    acc,  # [BLOCK_M, D_MAIN] fp32
    acc_rest,  # [BLOCK_M, D_REST or 16] fp32
    top,  # [BLOCK_M] fp32, largest score so far in units of log2
    total,  # [BLOCK_M] fp32, sum of the exponentials
    q,  # [BLOCK_M, D_MAIN]
    q_rest,  # [BLOCK_M, D_REST]
    k_ptr,  # this head's first key
    v_ptr,
    k_row,
    v_row,
    first_k,
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
    k_at = k_ptr + tl.cast(start, tl.int64) * k_row  # the scalar is 64 bits wide, the block's own offsets need 32
    v_at = v_ptr + tl.cast(start, tl.int64) * v_row
    live = start + cols < n_k
    k = load_live(k_at + cols[None, :] * k_row + dims[:, None], live=live[None, :], MASKED=MASKED)
    scores = tl.dot(q, k, input_precision=PRECISION)
    if D_REST > 0:
        rest = D_MAIN + tl.arange(0, D_REST)
        k_rest = load_live(k_at + cols[None, :] * k_row + rest[:, None], live=live[None, :], MASKED=MASKED)
        scores = tl.dot(q_rest, k_rest, scores, input_precision=PRECISION)
    if MASKED:
        if CAUSAL:
            seen = live[None, :] & ((start + cols)[None, :] <= (offs_m + shift)[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        else:
            scores = tl.where(live[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
    if MASKED and CAUSAL:  # a row that sees no key yet: -inf - -inf would be NaN
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
    else:
        base = new_top
    p = tl.exp2(scores * scale_log2 - base[:, None])
    alpha = tl.exp2(top - base)
    total = total * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None]
    if D_REST > 0:
        acc_rest = acc_rest * alpha[:, None]
    v = load_live(v_at + cols[:, None] * v_row + dims[None, :], live=live[:, None], MASKED=MASKED)
    p = p.to(v.dtype)
    acc = tl.dot(p, v, acc, input_precision=PRECISION)
    if D_REST > 0:
        v_rest = load_live(v_at + cols[:, None] * v_row + rest[None, :], live=live[:, None], MASKED=MASKED)
        acc_rest = tl.dot(p, v_rest, acc_rest, input_precision=PRECISION)
    return acc, acc_rest, new_top, total


@triton.jit(do_not_specialize=["n_q", "n_k", "tiles", "heads"])
def _fwd_kernel(
    q_ptr,  # [T, H, d], strides q_row, q_head, 1
    k_ptr,  # [Tk, H, d]
    v_ptr,  # [Tk, H, d]
    out_ptr,  # [T, H, d] contiguous
    lse_ptr,  # [H, T] fp32
    cu_q_ptr,  # [S + 1] int32, None when every sequence has n_q queries and n_k keys
    cu_k_ptr,  # [S + 1] int32
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    n_tokens,  # T
    n_q,
    n_k,
    tiles,  # of BLOCK_M queries in the longest sequence
    heads,
    scale_log2,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    VARLEN: tl.constexpr,
    CAUSAL: tl.constexpr,
    WITH_LSE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,  # width of the masked steps
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    pid = tl.program_id(0).to(tl.int64)
    head = (pid // tiles) % heads
    sequence = pid // tiles // heads
    m0 = (pid % tiles).to(tl.int32) * BLOCK_M
    if VARLEN:
        first_q = tl.load(cu_q_ptr + sequence).to(tl.int64)
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
    row_live = (offs_m < n_q)[:, None]
    q_at = q_ptr + first_q * q_row + head * q_head + lanes[:, None] * q_row
    q = tl.load(q_at + dims[None, :], mask=row_live, other=0.0)
    q_rest = q
    if D_REST > 0:
        q_rest = tl.load(q_at + D_MAIN + tl.arange(0, D_REST)[None, :], mask=row_live, other=0.0)
    k_ptr += first_k * k_row + head * k_head
    v_ptr += first_k * v_row + head * v_head

    acc = tl.zeros([BLOCK_M, D_MAIN], tl.float32)
    acc_rest = tl.zeros([BLOCK_M, D_REST if D_REST > 0 else 16], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    shift = n_k - n_q  # causal: the last query sees the last key
    if CAUSAL:
        full = tl.minimum(tl.maximum(m0 + shift + 1, 0), n_k) // BLOCK_N * BLOCK_N
        end = tl.minimum(m0 + BLOCK_M + shift, n_k)
    else:
        full = n_k // BLOCK_N * BLOCK_N
        end = n_k
    # As a loop even where one step is certain: written out, the step costs 40 registers and the third block of an SM.
    for j in tl.range(full, end, TAIL, num_stages=1):
        acc, acc_rest, top, total = _step(
            acc, acc_rest, top, total, q, q_rest, k_ptr, v_ptr, k_row, v_row, first_k, offs_m, j, n_k, shift,
            scale_log2, D_MAIN, D_REST, TAIL, True, CAUSAL, PRECISION,
        )  # fmt: skip
    for j in tl.range(0, full, BLOCK_N):
        acc, acc_rest, top, total = _step(
            acc, acc_rest, top, total, q, q_rest, k_ptr, v_ptr, k_row, v_row, first_k, offs_m, j, n_k, shift,
            scale_log2, D_MAIN, D_REST, BLOCK_N, False, CAUSAL, PRECISION,
        )  # fmt: skip

    weight = tl.where(total > 0, total, 1.0)  # a row without keys gives 0, and lse -inf
    width = heads * (D_MAIN + D_REST)
    out_at = out_ptr + first_q * width + head * (D_MAIN + D_REST) + lanes[:, None] * width
    tl.store(out_at + dims[None, :], (acc / weight[:, None]).to(out_ptr.dtype.element_ty), mask=row_live)
    if D_REST > 0:
        at = out_at + D_MAIN + tl.arange(0, D_REST)[None, :]
        tl.store(at, (acc_rest / weight[:, None]).to(out_ptr.dtype.element_ty), mask=row_live)
    if WITH_LSE:
        tl.store(lse_ptr + head * n_tokens + first_q + lanes, (top + tl.log2(weight)) * LN_2, mask=offs_m < n_q)


# -- launcher --


def split_width(d: int) -> tuple[int, int]:
    """A head width as a power of two and the rest: 80 -> (64, 16), 64 -> (64, 0)."""
    main = 1 << (d.bit_length() - 1)
    return main, d - main


def tail_width(n_k: int, block_n: int) -> int:
    """Width of the masked steps over the n_k % block_n keys left over, if every sequence has n_k: one step up to 64."""
    return min(max(triton.next_power_of_2(n_k % block_n), NARROWEST), 64)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    longest_q: int,
    longest_k: int,
    causal: bool,
    scale: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    """out [T, H, d] and lse [H, T] fp32 in natural log (no elements unless with_lse).

    cu_q and cu_k [S+1] int32, or both None: then every sequence has longest_q queries and longest_k keys.
    """
    n_tokens, heads, d = q.shape
    out = torch.empty((n_tokens, heads, d), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, n_tokens) if with_lse else (0,), dtype=torch.float32, device=q.device)
    if out.numel() == 0 or longest_q == 0:
        return out, lse
    sequences = n_tokens // longest_q if cu_q is None else cu_q.numel() - 1
    main, rest = split_width(d)
    exact = q.dtype == torch.float32 and not tf32_allowed()

    def launch(config: Mapping[str, Any]) -> None:
        tiles = triton.cdiv(longest_q, config["BLOCK_M"])
        one_tail = cu_q is None and not causal
        _fwd_kernel[(tiles * sequences * heads,)](
            q, k, v, out, lse, cu_q, cu_k,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            n_tokens, longest_q, longest_k, tiles, heads, scale * LOG2_E,
            D_MAIN=main, D_REST=rest, VARLEN=cu_q is not None, CAUSAL=causal, WITH_LSE=with_lse,
            PRECISION="ieee" if exact else "tf32", BLOCK_M=config["BLOCK_M"], BLOCK_N=config["BLOCK_N"],
            TAIL=tail_width(longest_k, config["BLOCK_N"]) if one_tail else config["TAIL"],
            num_warps=config["num_warps"], num_stages=config["num_stages"], **launch_options(q.device),
        )  # fmt: skip

    with torch.cuda.device_of(q):
        launch(tables.config("packed_attention", launch, **table_case(q.device, q.dtype, d, longest_k)))
    return out, lse


def table_case(device: torch.device, dtype: torch.dtype, d: int, n: int) -> dict[str, Any]:
    """What the table packed_attention.json is asked with."""
    return {"arch": tables.arch_of(device), "dtype": tables.dtype_name(dtype), "d": d, "n": n}
