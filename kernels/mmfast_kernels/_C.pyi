"""The C++ and CUDA routines (csrc/bindings.cpp). Addresses are of a tensor's first element, 0 where there is none.

Pixel types: 0 uint8, 1 float32. The routines do not check that an address is what it should be: call them through
mmfast_kernels.sampling, .gather, .attention_cpp, .attention_wgmma, .ted and .int8. All release the GIL and may run at
the same time.
"""

from collections.abc import Sequence

with_cuda: bool
cuda_archs: str
max_cuda_cells: int
max_wgmma_keys: int  # 0 where there is no attention_wgmma_cuda

def build_info() -> str: ...
def device_count() -> int: ...
def philox4x32_10(counter: Sequence[int], key: Sequence[int], /) -> list[int]: ...
def sample_keep(
    clip_ids: int, batch: int, views: int, slots: int, cells: int, keep: int, seed: int, per_slot: bool,
    keep_idx: int, threads: int, /,
) -> None: ...  # fmt: skip
def sample_keep_cuda(
    clip_ids: int, batch: int, views: int, slots: int, cells: int, keep: int, seed: int, per_slot: bool,
    keep_idx: int, stream: int, /,
) -> None: ...  # fmt: skip
def gather_tubes(
    video: int, video_type: int, size: Sequence[int], stride: Sequence[int], token_idx: int, clip_idx: int, count: int,
    tubelet: int, patch: int, rows: int, rows_type: int, scale: int, shift: int, threads: int, /,
) -> None: ...  # fmt: skip
def gather_tubes_cuda(
    video: int, video_type: int, size: Sequence[int], stride: Sequence[int], token_idx: int, clip_idx: int, count: int,
    tubelet: int, patch: int, rows: int, rows_type: int, scale: int, shift: int, stream: int, /,
) -> None: ...  # fmt: skip
def attention(
    q: int, q_layout: Sequence[int], k: int, k_layout: Sequence[int], v: int, v_layout: Sequence[int], cu_q: int,
    n_q: int, cu_k: int, n_k: int, sequences: int, heads: int, d: int, causal: bool, scale: float, out: int,
    lse: int, threads: int, widest: int, /,
) -> None: ...  # fmt: skip
def attention_backward(
    q: int, q_layout: Sequence[int], k: int, k_layout: Sequence[int], v: int, v_layout: Sequence[int], cu_q: int,
    n_q: int, cu_k: int, n_k: int, sequences: int, heads: int, d: int, causal: bool, scale: float, dout: int, out: int,
    lse: int, dq: int, dq_layout: Sequence[int], dk: int, dk_layout: Sequence[int], dv: int, dv_layout: Sequence[int],
    threads: int, widest: int, /,
) -> None: ...  # fmt: skip
def attention_wgmma_cuda(
    q: int, q_layout: Sequence[int], k: int, k_layout: Sequence[int], v: int, v_layout: Sequence[int], sequences: int,
    heads: int, n_q: int, n_k: int, scale: float, bf16: bool, out: int, lse: int, stream: int, /,
) -> None: ...  # fmt: skip
def ted_stencil(
    h: int, sites: int, size: Sequence[int], parameters: Sequence[int], time_width: int, space_width: int, out: int,
    threads: int, widest: int, /,
) -> None: ...  # fmt: skip
def ted_stencil_backward(
    dout: int, h: int, sites: int, size: Sequence[int], parameters: Sequence[int], time_width: int, space_width: int,
    dh: int, gradients: Sequence[int], threads: int, widest: int, /,
) -> None: ...  # fmt: skip
def ted_stencil_cuda(
    h: int, type: int, sites: int, size: Sequence[int], parameters: Sequence[int], time_width: int, space_width: int,
    out: int, stream: int, /,
) -> None: ...  # fmt: skip
def ted_stencil_backward_cuda(
    dout: int, h: int, type: int, sites: int, size: Sequence[int], parameters: Sequence[int], time_width: int,
    space_width: int, dh: int, gradients: Sequence[int], partials: int, groups: int, stream: int, /,
) -> None: ...  # fmt: skip
def int8_pass(
    rows: int, width: int, product: int, row_scale: int, column_scale: int, bias: int, values: int, residual: int,
    total: int, gelu: int, norm_weight: int, norm_bias: int, eps: float, out: int, out_scale: int, threads: int,
    widest: int, /,
) -> None: ...  # fmt: skip
def union_rows(
    keep_idx: int, tokens: int, cu_seqlens: int, sequences: int, views: int, union_idx: int, union_clip: int,
    row_of: int, /,
) -> int: ...  # fmt: skip
