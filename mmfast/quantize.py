"""int8 inference on the CPU: the linear layers of a model's blocks as int8 products, everything else in fp32.

Weights are rounded once, a scale for every output channel; activations as they come, a scale for every token. Attention, the
residual stream, the embedding, pooling and the head stay fp32, and so do the weights that the model holds: its state dict is the
one it had. Blocks of a few hundred tokens go from the attention to the end of a block at a time, so that the int32 sums and
the hidden layer stay in the cache.
"""

from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

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
from .masks import Pack

if TYPE_CHECKING:
    from .adapters import FrameLayout
    from .layers import Block

ROWS = 256  # a block of tokens for every thread


class Quantizable(nn.Module):
    """A model with `blocks` that can run in int8."""

    blocks: nn.ModuleList
    _int8 = False

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
        if getattr(self, "fused", None) is not None:
            raise ValueError("quantize_int8 takes a model that is not fused; call unfuse first")
        self.eval()
        with torch.no_grad():
            for block in self.blocks:
                block.int8 = Int8Block(block)  # type: ignore[assignment,arg-type]  # blocks are Blocks
        self._int8 = True
        return self

    def dequantize(self) -> Self:
        """Undo quantize_int8, exactly; the model itself is changed and returned."""
        for block in self.blocks:
            block.int8 = None  # type: ignore[assignment]  # blocks are Blocks
        self._int8 = False
        return self

    @property
    def is_int8(self) -> bool:
        """Whether quantize_int8 is in force."""
        return self._int8

    def train(self, mode: bool = True) -> Self:
        """nn.Module.train; ValueError for a model in int8, which cannot train."""
        if mode:
            self.refuse_if_int8("train")
        return super().train(mode)

    def refuse_if_int8(self, what: str) -> None:
        """ValueError for what a model in int8 cannot do."""
        if self._int8:
            raise ValueError(f"{what}: the model is in int8; call dequantize() first")


class Int8Block:
    """The linear layers of a Block in int8, and how the block runs with them."""

    def __init__(self, block: "Block") -> None:
        attn, mlp = block.attn, block.mlp
        self.qkv = quantize_weight(attn.qkv.weight, attn.joint_bias())
        self.proj = quantize_weight(attn.proj.weight, attn.proj.bias, block.gamma_1)
        self.fc1 = quantize_weight(mlp.fc1.weight, mlp.fc1.bias)
        self.fc2 = quantize_weight(mlp.fc2.weight, mlp.fc2.bias, block.gamma_2)
        self.gelu = "quick" if mlp.gelu == "quick" else "erf"  # as in fp32, "tanh" is the exact form on the CPU
        self.state: tuple[Any, ...] | None = _state(block)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"state": None}  # a copy of the model has weights at other addresses

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
        if block.training or (torch.is_grad_enabled() and x.requires_grad):
            raise ValueError("a model in int8 has no gradients; run it in eval mode under torch.no_grad")
        if torch.compiler.is_compiling():
            return
        self.state = self.state or _state(block)
        if _state(block) != self.state:
            raise ValueError("weights have changed since quantize_int8; call it again")


def _state(block: "Block") -> tuple[Any, ...]:
    """What changes where a weight that int8 has a copy of is set, moved or written to."""
    attn, mlp = block.attn, block.mlp
    biases = (attn.qkv.bias, attn.q_bias, attn.v_bias, attn.proj.bias, mlp.fc1.bias, mlp.fc2.bias)
    weights = (attn.qkv.weight, attn.proj.weight, mlp.fc1.weight, mlp.fc2.weight, block.gamma_1, block.gamma_2)
    given = [t for t in (*weights, *biases) if t is not None]
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in given)


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
