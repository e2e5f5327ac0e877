"""Triton kernels of mlp.py: one product over tensor descriptors (the copy engine of sm_90), one over pointers."""

import triton
import triton.language as tl

from mmfast_kernels.overlap_triton import begin


@triton.jit
def tanh(x, APPROX: tl.constexpr):
    """APPROX: the hardware's tanh, within 2^-11 of the value; otherwise exact to fp32."""
    if APPROX:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def gelu(x, MODE: tl.constexpr, APPROX: tl.constexpr):
    """The functions of mlp.py, on fp32."""
    if MODE == "erf":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif MODE == "tanh":
        # Without the bound the polynomial turns negative beyond |x| = 11.
        y = tl.minimum(x * x, 36.0)
        u = x * (0.797506497 + y * (0.0370045102 - y * 3.51252277e-4))
        return 0.5 * x * (1.0 + tanh(u, APPROX))
    else:
        tl.static_assert(MODE == "quick")
        return x / (1.0 + tl.exp(-1.702 * x))


@triton.jit
def _add_bias(acc, bias_ptr, cols, n_cols):
    if bias_ptr is None:
        return acc
    else:
        bias = tl.load(bias_ptr + cols, mask=cols < n_cols, other=0.0)
        return acc + bias.to(tl.float32)[None, :]


@triton.jit
def _store_half(y_desc, h_desc, row, col, acc, bias_ptr, n_cols, HALF: tl.constexpr, MODE, APPROX):
    h = _add_bias(acc, bias_ptr, col + tl.arange(0, HALF), n_cols)
    if h_desc is not None:
        h_desc.store([row, col], h.to(h_desc.dtype))
    y_desc.store([row, col], gelu(h, MODE, APPROX).to(y_desc.dtype))


@triton.jit
def linear_gelu_descriptor_kernel(
    x_desc,  # [M, K] in blocks [BM, BK]
    w_desc,  # [N, K] in blocks [BN, BK]
    y_desc,  # [M, N] in blocks [BM, BN / 2]
    h_desc,  # [M, N] in blocks [BM, BN / 2] | None: the product before the GELU, which a backward wants
    bias_ptr,  # [N] | None
    n_rows,
    n_cols,
    n_inner,  # K
    MODE: tl.constexpr,
    APPROX: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    FLATTEN: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Persistent: each program walks over tiles, those of one block of rows first, so that x is read from L2."""
    begin(OVERLAP)
    tiles_n = tl.cdiv(n_cols, BN)
    first = (
        tl.program_id(0).to(tl.int64).to(tl.int32)
    )  # a descriptor takes 32-bit coordinates and makes 64-bit addresses
    for tile in tl.range(first, tl.cdiv(n_rows, BM) * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        row = tile // tiles_n * BM
        col = tile % tiles_n * BN
        acc = tl.zeros([BM, BN], tl.float32)
        for k in range(0, n_inner, BK):
            acc = tl.dot(x_desc.load([row, k]), w_desc.load([col, k]).T, acc)
        # In two halves: the staging buffer shrinks, and two blocks with three stages fit one SM.
        left, right = acc.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
        _store_half(y_desc, h_desc, row, col, left, bias_ptr, n_cols, BN // 2, MODE, APPROX)
        _store_half(y_desc, h_desc, row, col + BN // 2, right, bias_ptr, n_cols, BN // 2, MODE, APPROX)


@triton.jit
def linear_gelu_kernel(
    x_ptr,  # [M, K]
    w_ptr,  # [N, K]
    y_ptr,  # [M, N]
    h_ptr,  # [M, N] | None: the product before the GELU
    bias_ptr,  # [N] | None
    x_stride,
    w_stride,
    n_rows,
    n_cols,
    n_inner,  # K
    MODE: tl.constexpr,
    APPROX: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,  # K is a multiple of BK
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    tiles_n = tl.cdiv(n_cols, BN)
    tile = tl.program_id(0).to(tl.int64)
    rows = tile // tiles_n * BM + tl.arange(0, BM)
    cols = tile % tiles_n * BN + tl.arange(0, BN)
    live_rows = (rows < n_rows)[:, None]
    live_cols = (cols < n_cols)[:, None]
    ks = tl.arange(0, BK)
    x_ptrs = x_ptr + rows[:, None] * x_stride + ks[None, :]
    w_ptrs = w_ptr + cols[:, None] * w_stride + ks[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, n_inner, BK):
        if EVEN_K:
            x = tl.load(x_ptrs + k, mask=live_rows, other=0.0)
            w = tl.load(w_ptrs + k, mask=live_cols, other=0.0)
        else:
            live_k = (k + ks < n_inner)[None, :]
            x = tl.load(x_ptrs + k, mask=live_rows & live_k, other=0.0)
            w = tl.load(w_ptrs + k, mask=live_cols & live_k, other=0.0)
        acc = tl.dot(x, w.T, acc, input_precision=PRECISION)
    acc = _add_bias(acc, bias_ptr, cols, n_cols)
    mask = live_rows & (cols < n_cols)[None, :]
    offsets = rows[:, None] * n_cols + cols[None, :]
    if h_ptr is not None:
        tl.store(h_ptr + offsets, acc.to(h_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + offsets, gelu(acc, MODE, APPROX).to(y_ptr.dtype.element_ty), mask=mask)
