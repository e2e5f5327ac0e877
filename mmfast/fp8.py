"""A block whose linear layers run in fp8, for inference on GPUs of compute capability 8.9 and later.

Of every layer the weights are rounded once, a scale for every output channel, and activations as they come, a scale for every
token: by the pass that adds and normalises, or by the epilogue of the product before. The stream of tokens and the attention
keep their precision. Where no kernel runs the same numbers are computed from the same rounded ones.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmfast_kernels.attention import packed_self_attention
from mmfast_kernels.fp8 import Fp8Weight, Norm, fp8_linear, fp8_linear_gelu, fp8_rows, quantize_weight
from mmfast_kernels.linear import linear

from . import profiling
from .masks import Pack
from .quantized import QuantizedBlock

if TYPE_CHECKING:
    from .adapters import FrameLayout
    from .layers import Block

LAYERS = ("qkv", "proj", "mlp")
# The projection is bound by memory: what its product would gain, one more pass over its input takes.
DEFAULT = ("qkv", "mlp")


class Fp8Block(QuantizedBlock):
    """The linear layers of a Block in fp8, or those of them in `layers`, and how the block runs with them."""

    kind = "fp8"

    def __init__(self, block: "Block", layers: Sequence[str]) -> None:
        super().__init__(block)
        attn, mlp = block.attn, block.mlp
        self.gelu = "quick" if mlp.gelu == "quick" else "tanh"  # to e4m3 the tanh form is what the exact one is
        self.qkv = quantize_weight(attn.qkv.weight, attn.joint_bias()) if "qkv" in layers else None
        self.proj = quantize_weight(attn.proj.weight, attn.proj.bias, block.gamma_1) if "proj" in layers else None
        self.mlp: tuple[Fp8Weight, Fp8Weight] | None = None
        if "mlp" in layers:
            fc2 = quantize_weight(mlp.fc2.weight, mlp.fc2.bias, block.gamma_2)
            self.mlp = (quantize_weight(mlp.fc1.weight, mlp.fc1.bias), fc2)

    def __call__(
        self,
        block: "Block",
        x: Tensor,
        branch: Tensor | None,
        pack: Pack,
        layout: "FrameLayout | None",
        seen: list[Tensor] | None,
    ) -> tuple[Tensor, Tensor | None]:
        self.check(block, x)
        attn = block.attn
        with profiling.range("attention"):
            x, branch = _adapted(block, block.adapter_pre_attn, x, branch, layout)
            if self.qkv is None:
                x, h = _normed(block.norm1, x, branch)
                qkv = linear(h, attn.qkv.weight, attn.joint_bias())
            else:
                rows, x = fp8_rows(x, branch, norm=_norm(block.norm1))
                qkv = fp8_linear(rows, self.qkv, dtype=_dtype(x))
            qkv = qkv.unflatten(-1, (3, attn.num_heads, -1))
            if seen is not None:
                seen.append(qkv)
            out = packed_self_attention(
                qkv,
                cu_seqlens=pack.cu_seqlens,
                length=pack.length,
                max_length=pack.max_length,
                causal=attn.causal,
            ).flatten(1)
            if self.proj is None:
                branch = _scaled(attn.proj(out), block.gamma_1)
            else:
                x, branch = fp8_linear(fp8_rows(out)[0], self.proj, x), None
        with profiling.range("mlp"):
            x, branch = _adapted(block, block.adapter_pre_mlp, x, branch, layout)
            if self.mlp is None:
                x, h = _normed(block.norm2, x, branch)
                return x, _scaled(block.mlp(h), block.gamma_2)
            fc1, fc2 = self.mlp
            rows, x = fp8_rows(x, branch, norm=_norm(block.norm2), before=fc1)
            return fp8_linear(fp8_linear_gelu(rows, fc1, self.gelu), fc2, x), None


def checked_layers(layers: Sequence[str]) -> tuple[str, ...]:
    """ValueError for layers that there are not."""
    if isinstance(layers, str) or not layers or not set(layers) <= set(LAYERS):
        raise ValueError(f"layers takes some of {LAYERS}, got {layers!r}")
    return tuple(layers)


def _adapted(
    block: "Block", adapter: nn.Module | None, x: Tensor, branch: Tensor | None, layout: "FrameLayout | None"
) -> tuple[Tensor, Tensor | None]:
    if not block.runs(adapter):
        return x, branch
    return block.adapted(adapter, x if branch is None else x + branch, layout), None


def _normed(norm: nn.Module, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
    return (x, norm(x)) if branch is None else norm.add(x, branch)  # type: ignore[operator]  # layers.py's LayerNorm


def _norm(norm: nn.LayerNorm) -> Norm:
    return Norm(norm.weight, norm.bias, norm.eps)


def _scaled(branch: Tensor, gamma: Tensor | None) -> Tensor:
    return branch if gamma is None else branch * gamma


def _dtype(x: Tensor) -> torch.dtype:
    """Of queries, keys and values: autocast's where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
