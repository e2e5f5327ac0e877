"""A small MaskedViT with TED-Adapters, for tests."""

from typing import Any

import torch
from torch import Tensor

from mmfast import MaskedViT, ViTConfig

SMALL: dict[str, Any] = dict(img_size=(48, 64), embed_dim=64, depth=3, num_heads=2, num_frames=8, num_classes=7)
GRID = (4, 3, 4)
HALVES: list[tuple[str, ...]] = [("attn",), ("mlp",), ("attn", "mlp")]


def make(**overrides: Any) -> MaskedViT:
    """A small model whose every parameter is random, those of adapters in all blocks too."""
    torch.manual_seed(0)
    model = MaskedViT(ViTConfig(**{**SMALL, "adapter_hidden": 24, **overrides})).eval()
    return randomised(model)


def randomised(model: MaskedViT) -> MaskedViT:
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.1 + (1.0 if p.dim() == 1 else 0.0) * 0.3)
    return model


def clips(batch: int = 2, frames: int = 8, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, frames, 48, 64, generator=torch.Generator().manual_seed(seed))


def adapter_parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if ".adapter_pre_" in name}
