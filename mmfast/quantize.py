"""Inference with the linear layers of a model's blocks in int8, on the CPU, or in fp8 (fp8.py), on a GPU.

int8: weights are rounded once, a scale for every output channel; activations as they come, a scale for every token. Attention,
the residual stream, the embedding, pooling and the head stay fp32, and so do the weights that the model holds: its state dict is
the one it had. Blocks of a few hundred tokens go from the attention to the end of a block at a time, so that the int32 sums and
the hidden layer stay in the cache.
"""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from mmfast_kernels import fp8
from mmfast_kernels.attention import packed_self_attention
from mmfast_kernels.int8 import (
    Int8Product,
    Int8Rows,
    Int8Weight,
    Norm,
    multiply,
    quantize_weight,
    to_float,
    to_rows,
)

from . import profiling
from .fp8 import DEFAULT, Fp8Block, checked_layers
from .masks import Pack
from .quantized import QuantizedBlock

if TYPE_CHECKING:
    from .adapters import FrameLayout
    from .layers import Block

ROWS = 256  # a block of tokens for every thread
_numbers = itertools.count(1)


class Quantizable(nn.Module):
    """A model with `blocks` that can run in int8 or fp8."""

    blocks: nn.ModuleList
    quantized: str | None = None  # "int8" or "fp8" where quantize_int8 or quantize_fp8 is in force
    _number = 0

    def quantize_int8(self) -> Self:
        """Run the blocks' linear layers in int8 from now on; the model itself is changed, into eval mode, and returned.

        For inference with fp32 weights on the CPU, under torch.no_grad or inference_mode. The fp32 weights stay: state_dict
        and save_pretrained give them, dequantize goes back to them exactly; one that changes later is refused until
        quantize_int8 is called again. Fastest with AVX-512 VNNI or AVX-VNNI; without either, weights have 7 bits.

        Raises ValueError on another device, another dtype, or with fuse_for_inference in force.
        """
        for name, p in self.named_parameters():
            if p.device.type != "cpu" or p.dtype != torch.float32:
                raise ValueError(f"quantize_int8 takes a model in fp32 on the CPU, {name} is {p.dtype} on {p.device}")
        self._quantize("int8", [Int8Block(block) for block in self._plain_blocks("quantize_int8")])
        return self

    def quantize_fp8(self, layers: Sequence[str] = DEFAULT) -> Self:
        """Run the blocks' linear layers in fp8 (e4m3) from now on; the model itself is changed, into eval mode, and returned.

        layers: some of "qkv", "proj" and "mlp" (both of its layers). For inference on a GPU of compute capability 8.9 or
        later, in bf16 or fp16 (weights, or by autocast), under torch.no_grad or inference_mode; on the CPU it is emulated, for
        its accuracy, slowly. The weights stay as they are for state_dict, save_pretrained and dequantize; where one changes or
        moves later, quantize_fp8 must be called again.

        Raises ValueError on another device, for widths not in multiples of 16, or with fuse_for_inference in force.
        """
        checked_layers(layers)
        for device in {p.device for p in self.parameters()}:
            if (fault := fp8.refusal(device)) is not None:
                raise ValueError(f"quantize_fp8: {fault}")
        self._quantize("fp8", [Fp8Block(block, layers) for block in self._plain_blocks("quantize_fp8")])
        return self

    def _plain_blocks(self, what: str) -> list["Block"]:
        if getattr(self, "fused", None) is not None:
            raise ValueError(f"{what} takes a model that is not fused; call unfuse first")
        return list(self.blocks)  # type: ignore[arg-type]  # blocks are Blocks

    def _quantize(self, kind: str | None, made: Sequence[QuantizedBlock | None]) -> None:
        if kind is not None:
            self.eval()
        for block, quantized in zip(self.blocks, made, strict=True):
            block.quantized = quantized  # type: ignore[assignment]  # blocks are Blocks
        self.quantized = kind
        self._number = next(_numbers)

    def dequantize(self) -> Self:
        """Undo quantize_int8 or quantize_fp8, exactly; the model itself is changed and returned."""
        self._quantize(None, [None] * len(self.blocks))
        return self

    @property
    def is_int8(self) -> bool:
        """Whether quantize_int8 is in force."""
        return self.quantized == "int8"

    def quantization(self) -> int:
        """A number of its own for every form the weights were rounded to; ValueError where they have changed since."""
        for block in self._quantized_blocks():
            block.quantized.check_weights(block)  # type: ignore[union-attr]  # every block has one
        return self._number

    def _quantized_blocks(self) -> list["Block"]:
        return [] if self.quantized is None else list(self.blocks)  # type: ignore[arg-type]  # blocks are Blocks

    def train(self, mode: bool = True) -> Self:
        """nn.Module.train; ValueError for a model in int8 or fp8, which cannot train."""
        if mode:
            self.refuse_if_quantized("train")
        return super().train(mode)

    def refuse_if_quantized(self, what: str) -> None:
        """ValueError for what a model in int8 or fp8 cannot do."""
        if self.quantized is not None:
            raise ValueError(f"{what}: the model is in {self.quantized}; call dequantize() first")


class Int8Block(QuantizedBlock):
    """The linear layers of a Block in int8, and how the block runs with them."""

    kind = "int8"

    def __init__(self, block: "Block") -> None:
        super().__init__(block)
        attn, mlp = block.attn, block.mlp
        self.qkv = quantize_weight(attn.qkv.weight, attn.joint_bias())
        self.proj = quantize_weight(attn.proj.weight, attn.proj.bias, block.gamma_1)
        self.fc1 = quantize_weight(mlp.fc1.weight, mlp.fc1.bias)
        self.fc2 = quantize_weight(mlp.fc2.weight, mlp.fc2.bias, block.gamma_2)
        self.gelu = "quick" if mlp.gelu == "quick" else "erf"  # as in fp32, "tanh" is the exact form on the CPU

    def __call__(
        self,
        block: "Block",
        x: Tensor,
        branch: Tensor | None,
        pack: Pack,
        layout: "FrameLayout | None",
        seen: list[Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """Block.forward without `rows`.   x, branch: fp32 [T, D].   Returns the stream and the branch to be added to it."""
        self._check(block, x)
        with profiling.range("attention"):
            x, qkv = self._attention_input(block, x.contiguous(), branch, layout)
            if seen is not None:
                seen.append(qkv)
            out = packed_self_attention(
                qkv,
                cu_seqlens=pack.cu_seqlens,
                length=pack.length,
                max_length=pack.max_length,
                causal=block.attn.causal,
            ).flatten(1)
        with profiling.range("mlp"):
            return self._mlp(block, x, out, layout)

    def _attention_input(
        self, block: "Block", x: Tensor, branch: Tensor | None, layout: "FrameLayout | None"
    ) -> tuple[Tensor, Tensor]:
        """The stream with the branch added and the adapter applied, and queries, keys and values [T, 3, H, d] of it."""
        if block.runs(block.adapter_pre_attn):
            x, branch = block.adapted(block.adapter_pre_attn, x if branch is None else x + branch, layout), None
        total = x if branch is None else torch.empty_like(x)
        qkv = torch.empty(x.shape[0], 3 * x.shape[1])
        sums = _sums(x, self.qkv)
        for part in _parts(x):
            if branch is None:
                rows = to_rows(x[part], norm=_norm(block.norm1))
            else:
                rows = to_rows(branch[part], x[part], norm=_norm(block.norm1), total=total[part])
            to_float(multiply(rows, self.qkv, sums), out=qkv[part])
        return total, qkv.unflatten(-1, (3, block.attn.num_heads, -1))

    def _mlp(self, block: "Block", x: Tensor, out: Tensor, layout: "FrameLayout | None") -> tuple[Tensor, Tensor]:
        """The stream [T, D] with the attention's output [T, D] projected and added, and the MLP's branch."""
        total, branch = torch.empty_like(x), torch.empty_like(x)
        sums = _sums(x, self.proj, self.fc1, self.fc2)
        adapts, norm = block.runs(block.adapter_pre_mlp), _norm(block.norm2)
        for part in _parts(x):
            attended = multiply(to_rows(out[part]), self.proj, sums)
            if adapts:
                to_float(attended, x[part], out=total[part])
            else:
                self._layers(to_rows(attended, x[part], norm=norm, total=total[part]), sums, branch[part])
        if adapts:
            total = block.adapted(block.adapter_pre_mlp, total, layout).contiguous()
            for part in _parts(x):
                self._layers(to_rows(total[part], norm=norm), sums, branch[part])
        return total, branch

    def _layers(self, rows: Int8Rows, sums: Tensor, out: Tensor) -> None:
        hidden: Int8Product = multiply(rows, self.fc1, sums)
        to_float(multiply(to_rows(hidden, gelu=self.gelu), self.fc2, sums), out=out)

    def _check(self, block: "Block", x: Tensor) -> None:
        if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            raise ValueError(
                f"a model in int8 runs in fp32 on the CPU without autocast, got {x.dtype} on {x.device}; "
                "call dequantize to run it otherwise"
            )
        self.check(block, x)


def _step() -> int:
    # torch.compile cannot ask for the number of threads.
    return ROWS if torch.compiler.is_compiling() else ROWS * torch.get_num_threads()


def _parts(x: Tensor) -> list[slice]:
    step = _step()
    return [slice(start, min(start + step, x.shape[0])) for start in range(0, x.shape[0], step)]


def _sums(x: Tensor, *weights: Int8Weight) -> Tensor:
    """Memory for the sums of a part's products."""
    most = min(_step(), x.shape[0])
    return torch.empty(most * max(w.values.shape[0] for w in weights), dtype=torch.int32)


def _norm(norm: nn.LayerNorm) -> Norm:
    return Norm(norm.weight, norm.bias, norm.eps)
