"""CLIP: images and video frames in one space with texts, both towers on packed tokens."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .clip_blocks import AdapterPlacement
from .clip_config import CLIPConfig
from .clip_text import CLIPText
from .clip_vision import CLIPVision
from .masks import Pack
from .vit import Mask

if TYPE_CHECKING:
    from .checkpoints import LoadReport


class CLIP(nn.Module):
    """CLIP (2103.00020): a vision tower, a text tower and the logarithm of the temperature's inverse.

    The tensors have the names of OpenAI's files but for the towers, `visual.` and `text.`, and the insides of a block.
    """

    load_report: "LoadReport | None" = None

    def __init__(
        self,
        config: CLIPConfig,
        *,
        vision_adapters: AdapterPlacement | None = None,
        text_adapters: AdapterPlacement | None = None,
        extra_text_blocks: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        self.visual = CLIPVision(config, vision_adapters)
        self.text = CLIPText(config, text_adapters, extra_text_blocks)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "CLIP":
        """A published size with random weights: "clip_vit_b16" or "ViT-B/16".   overrides: fields of CLIPConfig."""
        return cls(CLIPConfig.from_name(name, **overrides))

    @classmethod
    def from_pretrained(cls, source: str | Path | Mapping[str, Tensor], **overrides: Any) -> "CLIP":
        """A model from a file, folder or state dict of OpenAI, open_clip, Hugging Face or mmfast. In eval mode.

        overrides: fields of CLIPConfig, such as vision_num_heads and text_num_heads, which no state dict tells, and gelu.
        What was loaded and dropped stands in `load_report`.
        """
        from .checkpoints.clip import load_pretrained_clip

        model, report = load_pretrained_clip(source, **overrides)
        model.load_report = report
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model.safetensors and config.json, each whole or not at all."""
        from .checkpoints.save import write_folder

        write_folder(self.state_dict(), "CLIP", self.config.to_dict(), folder)

    def forward(self, images: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """exp(logit_scale) times the cosines: of every image [B, 3, H, W] with every text, [B, L], and the transpose."""
        image, text = (F.normalize(f, dim=-1) for f in (self.encode_image(images), self.encode_text(token_ids)))
        logits = self.logit_scale.exp() * image @ text.t()
        return logits, logits.t()

    def encode_image(self, pixels: Tensor, mask: Mask = None) -> Tensor:
        """Features of images [B, 3, H, W]: [B, E]; or of the frames of clips [B, 3, F, H, W]: [B, F, E].

        pixels: float and normalised already, or uint8. mask: as CLIPVision takes it, over (h, w) for images; with [B, P, N]
        the features are [B, P, E] or [B, P, F, E].
        """
        if isinstance(pixels, Tensor) and pixels.dim() == 4:
            return self.visual(pixels.unsqueeze(2), mask).squeeze(-2)
        return self.visual(pixels, mask)

    def encode_text(self, token_ids: Tensor, pack: Pack | None = None) -> Tensor:
        """Features [L, E] of token ids [L, up to context_length].   pack: as CLIPText.forward takes it."""
        return self.text(token_ids, pack)

    def set_grad_checkpointing(self, enable: bool = True, what: str = "block") -> None:
        """As MaskedViT's, of both towers."""
        self.visual.set_grad_checkpointing(enable, what)
        self.text.set_grad_checkpointing(enable, what)

    @property
    def mean(self) -> tuple[float, ...]:
        """Per channel, on px/255: what uint8 pixels are normalised with."""
        return self.config.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Per channel, on px/255: what uint8 pixels are normalised with."""
        return self.config.std

    @property
    def embed_dim(self) -> int:
        return self.config.embed_dim
