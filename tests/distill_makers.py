"""A student, teachers, clips and masks of the smallest sizes, for the tests of distillation."""

from typing import Any

import torch
from makers import tiny_config
from torch import Tensor, nn

from mmfast.distill import MultimodalDistillation
from mmfast.masks import tube_masks
from mmfast.vit import MaskedViT

GRID = (2, 2, 2)
CHANNELS = {"rgb": 3, "flow": 2, "pose": 21}


def vit(modality: str = "rgb", seed: int = 0, **overrides: Any) -> MaskedViT:
    """Pose has another patch and size, and the same token grid."""
    torch.manual_seed(seed)
    small = dict(img_size=8, patch_size=4) if modality == "pose" else {}
    tiny = tiny_config(in_chans=CHANNELS[modality], num_classes=0, final_norm=True, **{**small, **overrides})
    model = MaskedViT(tiny)
    for parameter in model.parameters():  # LayerNorms and biases too, so that a norm left out shows
        nn.init.normal_(parameter, std=0.1)
    return model


def teachers(*modalities: str, **overrides: Any) -> dict[str, MaskedViT]:
    return {modality: vit(modality, seed, **overrides) for seed, modality in enumerate(modalities, 1)}


def make(*modalities: str, **options: Any) -> MultimodalDistillation:
    model = MultimodalDistillation(vit(), teachers(*(modalities or ("flow", "rgb", "pose"))), **options)
    torch.manual_seed(9)
    for parameter in model.translate.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def clips(batch: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    sides = {"rgb": 32, "flow": 32, "pose": 8}
    return {
        modality: torch.randn(batch, channels, 4, sides[modality], sides[modality], generator=draw).to(dtype)
        for modality, channels in CHANNELS.items()
    }


def masks(batch: int = 3, views: int = 1) -> Tensor:
    mask = tube_masks(batch, views, GRID, 0.5, seed=1)
    return mask if views > 1 else mask[:, 0]
