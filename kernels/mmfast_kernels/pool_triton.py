"""Triton kernels of pool.py."""

# mypy: disable-error-code="assignment"
import triton
import triton.language as tl

from mmfast_kernels.norm_triton import load_columns, load_piece, load_rows, row_statistics, store_piece


@triton.jit
def _part_of_sequence(cu_ptr, length, program, SPLITS: tl.constexpr):
    """First token of a sequence, its number of tokens, and the bounds within it of the part that is this program's."""
    sequence = program // SPLITS
    if cu_ptr is None:
        start = sequence * length
        n = length
    else:
        start = tl.load(cu_ptr + sequence).to(tl.int64)
        n = (tl.load(cu_ptr + sequence + 1) - start).to(tl.int32)
    part = tl.cdiv(n, SPLITS)
    first = (program % SPLITS).to(tl.int32) * part
    return start, n, first, tl.minimum(first + part, n)


@triton.jit
def segment_sums_kernel(
    tokens_ptr,  # [T, D]
    cu_ptr,  # [S + 1] int32 | None
    sums_ptr,  # [S * SPLITS, D] fp32
    tokens_stride,
    length,
    eps,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    NORM: tl.constexpr,
):
    """Sums over one of SPLITS parts of a sequence: of its tokens, or of their norms before weight and bias."""
    program = tl.program_id(0).to(tl.int64)
    start, n, first, last = _part_of_sequence(cu_ptr, length, program, SPLITS)
    sums = ()
    for _ in tl.static_range(0, D, CHUNK):
        sums = sums + (tl.zeros([ROWS, CHUNK], tl.float32),)
    for row in range(first, last, ROWS):
        rows = row + tl.arange(0, ROWS)
        live = rows < last
        pieces = load_rows(tokens_ptr, start + rows, tokens_stride, live, D, CHUNK)
        grown = ()
        if NORM:
            mean, rstd = row_statistics(pieces, eps, D, CHUNK)
            for i in tl.static_range(len(pieces)):
                normed = (pieces[i] - mean[:, None]) * rstd[:, None]
                grown = grown + (sums[i] + tl.where(live[:, None], normed, 0.0),)
        else:
            for i in tl.static_range(len(pieces)):
                grown = grown + (sums[i] + pieces[i],)
        sums = grown
    out = program + tl.zeros([1], tl.int64)
    for i in tl.static_range(len(sums)):
        store_piece(sums_ptr, out, out >= 0, tl.sum(sums[i], 0)[None, :], i * CHUNK, D, CHUNK)


@triton.jit
def segment_mean_kernel(
    sums_ptr,  # [S * SPLITS, D] fp32
    cu_ptr,  # [S + 1] int32 | None
    token_weight_ptr,  # [D] | None
    token_bias_ptr,  # [D] | None
    weight_ptr,  # [D] | None
    bias_ptr,  # [D] | None
    y_ptr,  # [S, D]
    mean_ptr,  # [S, D] fp32, before token_weight and token_bias | None
    centre_ptr,  # [S] fp32: statistics of the norm of the mean | None
    rstd_ptr,  # [S] fp32 | None
    length,
    eps,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Mean of a sequence from its SPLITS sums, and its norm."""
    sequence = tl.program_id(0).to(tl.int64)
    if cu_ptr is None:
        n = length
    else:
        n = tl.load(cu_ptr + sequence + 1) - tl.load(cu_ptr + sequence)
    row = sequence * SPLITS + tl.zeros([1], tl.int64)
    sums = load_rows(sums_ptr, row, D, row >= 0, D, CHUNK)
    for split in tl.static_range(1, SPLITS):
        parts = load_rows(sums_ptr, row + split, D, row >= 0, D, CHUNK)
        grown = ()
        for i in tl.static_range(len(parts)):
            grown = grown + (sums[i] + parts[i],)
        sums = grown
    means = ()
    for i in tl.static_range(len(sums)):
        mean = sums[i] / tl.maximum(n, 1)
        if mean_ptr is not None:
            out = sequence + tl.zeros([1], tl.int64)
            store_piece(mean_ptr, out, out >= 0, mean, i * CHUNK, D, CHUNK)
        if token_weight_ptr is not None:
            # The same for every token, so applied once to their mean; an empty sequence stays 0.
            mean = mean * load_columns(token_weight_ptr, i * CHUNK, D, CHUNK)
            mean += tl.where(n > 0, load_columns(token_bias_ptr, i * CHUNK, D, CHUNK), 0.0)
        means = means + (mean,)
    row = sequence + tl.zeros([1], tl.int64)
    if weight_ptr is None:
        for i in tl.static_range(len(means)):
            store_piece(y_ptr, row, row >= 0, means[i], i * CHUNK, D, CHUNK)
    else:
        centre, rstd = row_statistics(means, eps, D, CHUNK)
        if centre_ptr is not None:
            tl.store(centre_ptr + row, centre)
            tl.store(rstd_ptr + row, rstd)
        for i in tl.static_range(len(means)):
            y = (means[i] - centre[:, None]) * rstd[:, None] * load_columns(weight_ptr, i * CHUNK, D, CHUNK)
            store_piece(y_ptr, row, row >= 0, y + load_columns(bias_ptr, i * CHUNK, D, CHUNK), i * CHUNK, D, CHUNK)


@triton.jit
def token_gradients_kernel(
    dmean_ptr,  # [S, D] fp32
    cu_ptr,  # [S + 1] int32 | None
    tokens_ptr,  # [T, D] | None without a norm of the tokens
    weight_ptr,  # [D], of that norm | None
    dtokens_ptr,  # [T, D]
    tokens_stride,
    length,
    eps,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The gradient of a sequence's mean, shared among its tokens and taken back through their norm."""
    program = tl.program_id(0).to(tl.int64)
    start, n, first, last = _part_of_sequence(cu_ptr, length, program, SPLITS)
    share = 1.0 / tl.maximum(n, 1)
    owner = program // SPLITS + tl.zeros([ROWS], tl.int64)
    shares = ()
    total = tl.zeros([ROWS, CHUNK], tl.float32)
    for begin in tl.static_range(0, D, CHUNK):
        piece = load_piece(dmean_ptr, owner, D, owner >= 0, begin, D, CHUNK) * share
        if weight_ptr is not None:
            piece *= load_piece(weight_ptr, owner, 0, owner >= 0, begin, D, CHUNK)
            total += piece
        shares = shares + (piece,)
    total_mean = (tl.sum(total, 1) / D)[:, None]
    for row in range(first, last, ROWS):
        rows = row + tl.arange(0, ROWS)
        live = rows < last
        if weight_ptr is None:
            for i in tl.static_range(len(shares)):
                store_piece(dtokens_ptr, start + rows, live, shares[i], i * CHUNK, D, CHUNK)
        else:
            pieces = load_rows(tokens_ptr, start + rows, tokens_stride, live, D, CHUNK)
            mean, rstd = row_statistics(pieces, eps, D, CHUNK)
            along = tl.zeros([ROWS, CHUNK], tl.float32)
            for i in tl.static_range(len(pieces)):
                along += shares[i] * (pieces[i] - mean[:, None])
            slope = (tl.sum(along, 1) / D * rstd * rstd)[:, None]
            for i in tl.static_range(len(pieces)):
                dx = (shares[i] - (pieces[i] - mean[:, None]) * slope - total_mean) * rstd[:, None]
                store_piece(dtokens_ptr, start + rows, live, dx, i * CHUNK, D, CHUNK)


@triton.jit
def ensemble_kernel(
    logits_ptr,  # [B, P, K]
    probs_ptr,  # [B, K] fp32
    clip_stride,
    view_stride,
    n_views,
    n_classes,
    BLOCK: tl.constexpr,
):
    """BLOCK classes of one clip. Every program reads all classes of a view for its maximum and its sum."""
    blocks = tl.cdiv(n_classes, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    clip = program // blocks
    lane = tl.arange(0, BLOCK)
    own = (program % blocks).to(tl.int32) * BLOCK + lane
    total = tl.zeros([BLOCK], tl.float32)
    row_ptr = logits_ptr + clip * clip_stride
    for _ in range(n_views):
        top = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in range(0, n_classes, BLOCK):
            ks = start + lane
            x = tl.load(row_ptr + ks, mask=ks < n_classes, other=float("-inf")).to(tl.float32)
            top = tl.maximum(top, x)
        peak = tl.max(top, 0)
        denominator = tl.zeros([BLOCK], tl.float32)
        for start in range(0, n_classes, BLOCK):
            ks = start + lane
            x = tl.load(row_ptr + ks, mask=ks < n_classes, other=float("-inf")).to(tl.float32)
            denominator += tl.exp(x - peak)
        x = tl.load(row_ptr + own, mask=own < n_classes, other=float("-inf")).to(tl.float32)
        total += tl.exp(x - peak) / tl.sum(denominator, 0)
        row_ptr += view_stride
    tl.store(probs_ptr + clip * n_classes + own, total / n_views, mask=own < n_classes)
