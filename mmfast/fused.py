"""A stack of blocks prepared for inference: the same function by less work.

    norm's scale g and shift b    W (g n + b) + c = (W diag(g)) n + (c + W b)        n = (s - mean(s)) * rstd(s)
    LayerScale                    gamma (W a + c) = (diag(gamma) W) a + gamma c
    residual addition             x <- x + W a in the product's epilogue, s = x + carry

Weights are folded in float64 and rounded once. With kernels the biases of proj and fc2 are not added to the stream x but
summed up over the layers into `carry`, which the norm adds as it reads x: in bf16 a layer moves 52 D bytes a token, not 56.
On the CPU, where the library adds a bias for nothing, it does; what is saved there is packing every weight for every product.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from mmfast_kernels.attention import packed_self_attention
from mmfast_kernels.dispatch import needs_grad, use_kernel
from mmfast_kernels.linear import add_linear_, linear, onednn_takes, pack_weight
from mmfast_kernels.mlp import linear_gelu
from mmfast_kernels.standardise import standardise

from . import profiling
from .layers import Block, Constant, LayerNorm, Linear, mean_with_product
from .masks import Pack

if TYPE_CHECKING:
    from .adapters import FrameLayout

Folded = tuple[Tensor, Tensor]  # weight and bias, float64


_generations = itertools.count(1)


class _Forms(dict[Any, tuple[Tensor, Tensor]]):
    """Of a name, a weight and its copy in another form: never copied or pickled with it, but made anew where needed."""

    def __deepcopy__(self, memo: Any) -> "_Forms":
        return _Forms()

    def __reduce__(self) -> Any:
        return _Forms, ()


class FoldedLinear(nn.Module):
    """x W^T + b whose weight no longer changes, so that it is kept in the form the product reads."""

    weight: Tensor
    bias: Tensor

    def __init__(self, folded: Folded, like: Tensor) -> None:
        super().__init__()
        for name, tensor in zip(("weight", "bias"), folded, strict=True):
            self.register_buffer(name, tensor.detach().to(like.dtype), persistent=False)
        self._forms = _Forms()

    def operands(self, x: Tensor) -> Folded:
        """Weight and bias for a product with x: in autocast's dtype, packed for the CPU's library, or as they are."""
        weight, bias, device = self.weight, self.bias, x.device.type
        if torch.compiler.is_compiling():
            return weight, bias
        if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
            return self._form(dtype, lambda w: w.to(dtype)), bias.to(dtype)
        if not use_kernel(x) and onednn_takes(x, weight) and not needs_grad(x):
            return self._form("packed", pack_weight), bias
        return weight, bias

    def _form(self, name: Any, make: Callable[[Tensor], Tensor]) -> Tensor:
        kept = self._forms.get(name)
        if kept is None or kept[0] is not self.weight:  # the model has moved
            kept = self._forms[name] = self.weight, make(self.weight)
        return kept[1]


class FusedBlock(nn.Module):
    """A Block of the module's equations.   carry: float64 [D], of the blocks before; `left` is what it leaves in turn."""

    def __init__(self, block: Block, carry: Tensor, gelu: str | None) -> None:
        super().__init__()
        attn, mlp = block.attn, block.mlp
        self._block = (block,)  # not registered: its parameters stay the model's own
        self.gelu = _checked_gelu(mlp.gelu, gelu)
        self.qkv = FoldedLinear(_behind(block.norm1, attn.qkv.weight, attn.joint_bias()), attn.qkv.weight)
        proj = _scaled(attn.proj, block.gamma_1)
        self.proj = FoldedLinear(proj, attn.proj.weight)
        self.fc1 = FoldedLinear(_behind(block.norm2, mlp.fc1.weight, mlp.fc1.bias), mlp.fc1.weight)
        fc2 = _scaled(mlp.fc2, block.gamma_2)
        self.fc2 = FoldedLinear(fc2, mlp.fc2.weight)
        self.carries = nn.ModuleList()
        for adapter, added in ((block.adapter_pre_attn, proj[1]), (block.adapter_pre_mlp, fc2[1])):
            self.carries.append(Constant(carry))
            carry = added if adapter is not None else carry + added  # an adapter reads the stream with all its biases
        self.left = carry

    def forward(self, x: Tensor, pack: Pack, layout: "FrameLayout | None", carrying: bool) -> Tensor:
        """x [T, D] after the block, in x's place. carrying: x is without the biases of proj and fc2."""
        x = self._attended(x, pack, layout, carrying)
        with profiling.range("mlp"):
            x, hidden = self._hidden(x, layout, carrying)
            return _add(x, hidden, self.fc2, carrying)

    def forward_mean(self, x: Tensor, pack: Pack, layout: "FrameLayout | None", carrying: bool) -> Tensor:
        """As Block's, of what forward leaves."""
        assert pack.length is not None
        x = self._attended(x, pack, layout, carrying)
        with profiling.range("mlp"):
            x, hidden = self._hidden(x, layout, carrying)
            return mean_with_product(x, hidden, pack.length, self.fc2.weight, None if carrying else self.fc2.bias)

    def _attended(self, x: Tensor, pack: Pack, layout: "FrameLayout | None", carrying: bool) -> Tensor:
        block = self._block[0]
        with profiling.range("attention"):
            x, h = self._normed(0, block.norm1, block.adapter_pre_attn, x, layout, carrying)
            qkv = linear(h, *self.qkv.operands(h)).unflatten(-1, (3, block.attn.num_heads, -1))
            out = packed_self_attention(
                qkv,
                cu_seqlens=pack.cu_seqlens,
                length=pack.length,
                max_length=pack.max_length,
                causal=block.attn.causal,
            )
            return _add(x, out.flatten(1), self.proj, carrying)

    def _hidden(self, x: Tensor, layout: "FrameLayout | None", carrying: bool) -> tuple[Tensor, Tensor]:
        block = self._block[0]
        x, h = self._normed(1, block.norm2, block.adapter_pre_mlp, x, layout, carrying)
        return x, linear_gelu(h, *self.fc1.operands(h), self.gelu)

    def _normed(
        self,
        half: int,
        norm: LayerNorm,
        adapter: nn.Module | None,
        x: Tensor,
        layout: "FrameLayout | None",
        carrying: bool,
    ) -> tuple[Tensor, Tensor]:
        carry = self.carries[half]() if carrying else None
        if adapter is not None:
            x, carry = x if carry is None else x.add_(carry), None
            block = self._block[0]
            x = block.adapted(adapter, x, layout) if block.runs(adapter) else x
        return x, standardise(x, carry, norm.eps)


class FusedBlocks(nn.Module):
    """Blocks, one after another, without their gradients.   gelu: "tanh" in place of "erf", or None for the blocks' own.

    generation: a number of its own, a new one whenever weights may lie elsewhere.
    """

    def __init__(self, blocks: Sequence[nn.Module], gelu: str | None) -> None:
        super().__init__()
        self._blocks = tuple(blocks)
        self.generation = next(_generations)
        made: list[FusedBlock] = []
        for block in blocks:
            assert isinstance(block, Block)
            carry = made[-1].left if made else torch.zeros_like(block.norm1.weight, dtype=torch.float64)
            made.append(FusedBlock(block, carry, gelu))
        self.blocks = nn.ModuleList(made)
        self.carry = Constant(made[-1].left if made else torch.zeros(0))

    def forward(self, x: Tensor, pack: Pack, layout: "FrameLayout | None" = None) -> Tensor:
        """The stream [T, D] after the last block, of x [T, D], which stays as it is. ValueError where a gradient is wanted."""
        x, carrying = self._through(x, pack, layout, len(self.blocks))
        return x.add_(self.carry()) if carrying and self._blocks else x

    def forward_mean(self, x: Tensor, pack: Pack, layout: "FrameLayout | None" = None) -> Tensor:
        """The mean [S, D] of that stream over each sequence, in fp32."""
        last = len(self.blocks) - 1
        x, carrying = self._through(x, pack, layout, last)
        with profiling.range(f"block{last}"):
            mean = self.blocks[last].forward_mean(x, pack, layout, carrying)  # type: ignore[operator]  # a FusedBlock's
        return mean + self.carry() if carrying else mean

    def _through(self, x: Tensor, pack: Pack, layout: "FrameLayout | None", count: int) -> tuple[Tensor, bool]:
        """The stream after the first `count` blocks, and whether it is without the biases of proj and fc2."""
        if torch.is_grad_enabled() and needs_grad(x, *(p for block in self._blocks for p in block.parameters())):
            raise ValueError(
                "the model is fused for inference and has no gradients: call it under torch.no_grad(), or unfuse() it"
            )
        carrying = use_kernel(x)
        x = x.clone()
        for i in range(count):
            with profiling.range(f"block{i}"):
                x = self.blocks[i](x, pack, layout, carrying)
        return x, carrying

    def _apply(self, *args: Any, **options: Any) -> Self:
        self.generation = next(_generations)
        return super()._apply(*args, **options)


class Fusible(nn.Module):
    """A model whose blocks can be fused for inference."""

    fused: FusedBlocks | None

    def __init__(self) -> None:
        super().__init__()
        self.register_module("fused", None)

    def _to_fuse(self) -> Sequence[nn.Module]:
        """The blocks that run one after another."""
        raise NotImplementedError

    def fuse_for_inference(self, gelu: str | None = None) -> Self:
        """Prepare the blocks for inference: the same results, to rounding, from copies of the weights made now.

        Norms and LayerScale go into the products, residual additions into their epilogues; on the CPU weights are packed.
        gelu: "tanh" takes the refit tanh form, at most 2.6e-5 from the exact one, in place of "erf" (where no kernel runs
        both are the exact one); None keeps the model's. Until unfuse() the model has no gradients, refuses train() and
        load_state_dict(), and does not follow weights changed in place; state_dict() is the unfused one. `stream` and
        `forward_intermediates` run the blocks themselves. Returns the model. ValueError in training mode or for a wrong gelu.
        """
        if self.training:
            raise ValueError(
                "fuse_for_inference takes a model in eval mode, got one in training mode: call eval() first"
            )
        self.fused = None  # no stale copies beside the new ones
        with torch.no_grad():
            self.fused = FusedBlocks(self._to_fuse(), gelu).eval()
        return self

    def unfuse(self) -> Self:
        """Undo fuse_for_inference. Returns the model."""
        self.fused = None
        return self

    def train(self, mode: bool = True) -> Self:
        """As nn.Module's; ValueError for a fused model."""
        if mode:
            self.refuse_if_fused("train")
        return super().train(mode)

    def refuse_if_fused(self, what: str) -> None:
        """ValueError for what a fused model cannot do."""
        if self.fused is not None:
            raise ValueError(f"{what}: the model is fused for inference; call unfuse() first")

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        self.refuse_if_fused("load_state_dict")
        super()._load_from_state_dict(*args, **options)


def _add(x: Tensor, a: Tensor, to: FoldedLinear, carrying: bool) -> Tensor:
    weight, bias = to.operands(a)
    return add_linear_(x, a, weight, None if carrying else bias)


def _behind(norm: LayerNorm, weight: Tensor, bias: Tensor | None) -> Folded:
    """The product with what the norm left."""
    wide = weight.double()
    shift = wide @ norm.bias.double()
    return wide * norm.weight.double(), shift if bias is None else shift + bias.double()


def _scaled(layer: Linear, gamma: Tensor | None) -> Folded:
    weight, bias = layer.weight, layer.bias.double()
    return (weight, bias) if gamma is None else (weight.double() * gamma.double()[:, None], bias * gamma.double())


def _checked_gelu(own: str, wanted: str | None) -> str:
    if wanted is None or wanted == own:
        return own
    if {own, wanted} != {"erf", "tanh"}:
        raise ValueError(f'gelu takes "erf" or "tanh" in place of the other, got {wanted!r} for a model with {own!r}')
    return wanted
