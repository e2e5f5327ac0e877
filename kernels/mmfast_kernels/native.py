"""mmfast_kernels._C as tensors need it: addresses, the current stream, the number of threads."""

import torch
from torch import Tensor

from mmfast_kernels import _C

__all__ = ["_C", "address", "check_ids", "on_native_cuda", "stream", "threads"]


def address(t: Tensor | None) -> int:
    """Address of the first element; 0 for None, which csrc takes as null."""
    return 0 if t is None else t.data_ptr()


def stream(device: torch.device) -> int:
    """Handle of the device's current CUDA stream."""
    return torch.cuda.current_stream(device).cuda_stream


def threads() -> int:
    """How many threads a CPU routine may start: what torch itself uses."""
    return torch.get_num_threads()


def on_native_cuda(t: Tensor) -> bool:
    """True where csrc has a CUDA routine for this tensor: it is on a GPU, and csrc was built with nvcc."""
    return t.is_cuda and _C.with_cuda


def check_ids(name: str, t: Tensor, dtype: torch.dtype) -> None:
    """Raises TypeError, ValueError unless t is a vector of this dtype."""
    if t.dtype != dtype:
        raise TypeError(f"{name}: got {t.dtype}, takes {dtype}")
    if t.dim() != 1:
        raise ValueError(f"{name}: got shape {tuple(t.shape)}, takes one dimension")
