"""What blocks with rounded copies of their weights have in common."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .masks import Pack

if TYPE_CHECKING:
    from .adapters import FrameLayout
    from .layers import Block


class QuantizedBlock:
    """Copies of a Block's weights in `kind`, which hold as long as the weights stay as they are."""

    kind: str

    def __call__(
        self,
        block: "Block",
        x: Tensor,
        branch: Tensor | None,
        pack: Pack,
        layout: "FrameLayout | None",
        seen: list[Tensor] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Block.forward without `rows`.   x, branch: [T, D].   Returns the stream and what is still to be added to it, if any."""
        raise NotImplementedError

    def __init__(self, block: "Block") -> None:
        self.state: tuple[Any, ...] | None = _state(block)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"state": None}  # a copy of the model has weights at other addresses

    def check(self, block: "Block", x: Tensor) -> None:
        """ValueError where a gradient is wanted, or weights have changed."""
        if block.training or (torch.is_grad_enabled() and x.requires_grad):
            raise ValueError(f"a model in {self.kind} has no gradients; run it in eval mode under torch.no_grad")
        if not torch.compiler.is_compiling():
            self.check_weights(block)

    def check_weights(self, block: "Block") -> None:
        """ValueError where weights have changed."""
        self.state = self.state or _state(block)
        if _state(block) != self.state:
            raise ValueError(f"weights have changed since quantize_{self.kind}; call it again")


def _state(block: "Block") -> tuple[Any, ...]:
    """What changes where a weight that has a copy is set, moved or written to."""
    attn, mlp = block.attn, block.mlp
    biases = (attn.qkv.bias, attn.q_bias, attn.v_bias, attn.proj.bias, mlp.fc1.bias, mlp.fc2.bias)
    weights = (attn.qkv.weight, attn.proj.weight, mlp.fc1.weight, mlp.fc2.weight, block.gamma_1, block.gamma_2)
    given = [t for t in (*weights, *biases) if t is not None]
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in given)
