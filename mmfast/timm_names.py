"""What timm calls the parts of a model."""

from dataclasses import replace
from typing import Any

from torch import nn

from .config import ViTConfig
from .layers import Linear


class TimmNames(nn.Module):
    """timm's names on a model with a config, blocks and a head."""

    config: ViTConfig
    blocks: nn.ModuleList
    head: nn.Module

    @property
    def num_features(self) -> int:
        return self.config.embed_dim

    @property
    def embed_dim(self) -> int:
        return self.config.embed_dim

    @property
    def num_classes(self) -> int:
        return self.config.num_classes

    def get_num_layers(self) -> int:
        return len(self.blocks)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head of `num_classes` classes; 0 removes it. global_pool: "mean" or "first"."""
        changes: dict[str, Any] = {"num_classes": num_classes} | ({"pool": global_pool} if global_pool else {})
        self.config = replace(self.config, **changes)
        like = next(self.blocks.parameters())
        head = Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()
        self.head = head.to(like.device, like.dtype)
        self.head.apply(init_weights)

    def no_weight_decay(self) -> set[str]:
        return set()


def init_weights(module: nn.Module) -> None:
    """VideoMAE's, of a linear layer."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
