"""Triton kernel of mlp.py's backward: derivative of the GELU, the GELU itself again, and column sums, in one pass."""

import triton
import triton.language as tl


@triton.jit
def gate_and_slope(h, MODE: tl.constexpr):
    """g and d of gelu(h) = h g, d = dgelu/dh. Always from exact functions: d meets the difference of near-equal numbers."""
    if MODE == "erf":
        gate = 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))
        return gate, gate + h * (0.3989422804014327 * tl.exp(-0.5 * h * h))
    elif MODE == "tanh":
        # 0.5 (1 + tanh u) = sigmoid(2u). Beyond the bound gate (1 - gate) < 2e-9, whatever du is.
        r = tl.minimum(h * h, 36.0)
        du = 0.797506497 + r * (0.1110135306 - r * 1.756261385e-3)
        gate = 1.0 / (1.0 + tl.exp(-2.0 * h * (0.797506497 + r * (0.0370045102 - r * 3.51252277e-4))))
        return gate, gate * (1.0 + 2.0 * h * (1.0 - gate) * du)
    else:
        tl.static_assert(MODE == "quick")
        gate = 1.0 / (1.0 + tl.exp(-1.702 * h))
        return gate, gate * (1.0 + 1.702 * h * (1.0 - gate))


@triton.jit
def gelu_backward_kernel(
    dy_ptr,  # [M, N]
    h_ptr,  # [M, N], before the GELU
    dh_ptr,  # [M, N]
    act_ptr,  # [M, N] | None: gelu(h)
    sums_ptr,  # [groups, N] fp32 | None: sums of dh over a group's rows
    n_rows,
    n_cols,
    MODE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """A program owns BN columns of every groups-th block of BM rows, so that its sums meet no other program's."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(n_cols, BN)
    group, groups = program // blocks, tl.num_programs(0) // blocks
    cols = program % blocks * BN + tl.arange(0, BN)
    live_cols = (cols < n_cols)[None, :]
    sums = tl.zeros([BM, BN], tl.float32)
    for start in range(group * BM, n_rows, groups * BM):
        rows = start + tl.arange(0, BM)
        offsets = rows[:, None] * n_cols + cols[None, :]
        mask = (rows < n_rows)[:, None] & live_cols
        h = tl.load(h_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        gate, slope = gate_and_slope(h, MODE)
        dh = dy * slope
        tl.store(dh_ptr + offsets, dh.to(dh_ptr.dtype.element_ty), mask=mask)
        if act_ptr is not None:
            tl.store(act_ptr + offsets, (h * gate).to(act_ptr.dtype.element_ty), mask=mask)
        sums += dh
    if sums_ptr is not None:
        tl.store(sums_ptr + group * n_cols + cols, tl.sum(sums, 0), mask=cols < n_cols)
