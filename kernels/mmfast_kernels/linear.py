"""y = x W^T + b, by the library that is fastest at it.

On the CPU F.linear goes to MKL, which on processors not Intel's reaches half of what oneDNN does at these shapes; torch carries
both. oneDNN's operator has no derivative, so a call that needs one goes to F.linear, as does everything on a GPU (cuBLAS).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear.   x: [..., K].  weight: [N, K].  bias: [N] or None.   Returns [..., N]."""
    if onednn_takes(x, weight, bias):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def linear_erf_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.gelu(F.linear(x, weight, bias)), in one pass where oneDNN takes it."""
    if onednn_takes(x, weight, bias):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "none")
    return F.gelu(F.linear(x, weight, bias))


def onednn_takes(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether oneDNN's operator may run on these. Not while tracing: a graph should hold torch's public operators."""
    given = (x, weight) if bias is None else (x, weight, bias)
    return (
        _ONEDNN
        and not torch.compiler.is_compiling()
        and all(t.device.type == "cpu" and t.dtype == torch.float32 for t in given)
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in given))
    )
