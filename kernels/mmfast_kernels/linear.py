"""y = x W^T + b, by the library that is fastest at it.

On the CPU F.linear goes to MKL, which on AMD processors reaches about half of what oneDNN does at these shapes; torch carries
both. oneDNN's operator has no derivative, so a call that needs one goes to F.linear, as does everything on a GPU (cuBLAS).
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear.   x: [..., K].  weight: [N, K].  bias: [N] or None.   Returns [..., N]."""
    if onednn_takes(x, weight, bias):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def linear_gelu_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Exact GELU of linear(x, weight, bias), in the product's epilogue. Only where onednn_takes."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "none")


def onednn_takes(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether oneDNN's fused linear may run on these: fp32 on the CPU, no gradient, no autocast, not being traced."""
    given = (x, weight) if bias is None else (x, weight, bias)
    return (
        all(t.device.type == "cpu" and t.dtype == torch.float32 for t in given)
        and not torch.compiler.is_compiling()
        and x.numel() > 0
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in given))
    )
