"""Small EVLs on either backbone with every parameter random, and what their plain restatement takes."""

from typing import Any

import plain_evl
import torch
from plain import part
from torch import Tensor

from mmfast.clip_config import CLIPConfig
from mmfast.config import ViTConfig
from mmfast.evl import EVL
from mmfast.evl_config import EVLConfig

FRAMES, CLASSES = 4, 5
CLIP_TOWERS = CLIPConfig(
    embed_dim=24, image_size=24, patch_size=8, vision_width=48, vision_depth=3, vision_num_heads=3, context_length=7,
    vocab_size=30, text_width=64, text_depth=1, text_num_heads=1,
)  # fmt: skip
VIT = ViTConfig(
    img_size=(24, 16), patch_size=8, num_frames=6, tubelet_size=2, embed_dim=32, depth=3, num_heads=2, final_norm=True
)
BACKBONES = {"clip": CLIP_TOWERS, "vit": VIT}


def tiny_config(backbone: str = "clip", **changes: Any) -> EVLConfig:
    own: dict[str, Any] = dict(num_layers=2, num_classes=CLASSES)
    own |= {"num_frames": FRAMES} if backbone == "clip" else {}
    return EVLConfig(BACKBONES[backbone], **{**own, **changes})


def randomise(model: EVL, seed: int = 0) -> EVL:
    """In eval mode, nothing at its initial zero, so that every parameter counts."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=draw))
    return model.eval()


def tiny_model(backbone: str = "clip", **changes: Any) -> EVL:
    torch.manual_seed(0)
    return randomise(EVL(tiny_config(backbone, **changes)))


def clips(config: EVLConfig, batch: int = 2, seed: int = 1) -> Tensor:
    b = config.backbone
    if isinstance(b, CLIPConfig):
        shape = (config.num_frames, b.image_size, b.image_size)
    else:
        shape = (b.num_frames, *b.frame_size)
    return torch.randn(batch, 3, *shape, generator=torch.Generator().manual_seed(seed))


def plain_layers(config: EVLConfig, state: dict[str, Tensor], video: Tensor, kept: Tensor | None = None) -> Any:
    """What the decoder reads, by the restatement; the last so many blocks."""
    own = part(state, "backbone.")
    if isinstance(config.backbone, CLIPConfig):
        layers = plain_evl.clip_layers(config.backbone, own, video, kept)
    else:
        layers = plain_evl.vit_layers(config.backbone, own, video)
    return layers[-config.num_layers :]


def plain_logits(config: EVLConfig, state: dict[str, Tensor], video: Tensor, kept: Tensor | None = None) -> Tensor:
    return plain_evl.logits(config, state, plain_layers(config, state, video, kept), kept)


def kept_cells(mask: Tensor, config: EVLConfig) -> Tensor:
    """int64 [V, n]: cells that a tube mask bool [V, N] keeps."""
    first = mask[:, : config.grid[0] * config.grid[1]]
    return (~first).nonzero()[:, 1].view(len(mask), -1)
