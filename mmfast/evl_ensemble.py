"""An EVL where a classifier of masked views is asked for: ensembles of tube-masked views, features, predictions of folders."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .clip_config import CLIPConfig
from .ensemble import micro_batch_size, run_in_micro_batches
from .evl import EVL
from .masks import ClipIds, Grid, Pack, clip_id_tensor, kept_per_slot, sample_pack


@dataclass(frozen=True)
class EnsembleConfig:
    """What is asked of a classifier's config, as ViTConfig has it."""

    grid: Grid
    num_frames: int
    frame_size: tuple[int, int]
    in_chans: int
    num_classes: int
    embed_dim: int
    of: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """That of the EVL."""
        return self.of


class Ensembled(nn.Module):
    """The ensemble of a model that has `logits(video, pack)`, a `device` and a `config`."""

    config: EnsembleConfig

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        raise NotImplementedError

    def check_video(self, video: Tensor) -> Grid:
        """The token grid of a video, or an error that says what is wrong with it."""
        raise NotImplementedError

    def logits(self, video: Tensor, pack: Pack) -> Tensor:
        """[S, K] of the views of a pack."""
        raise NotImplementedError

    @torch.no_grad()
    def ensemble(
        self, video: Tensor, views: int = 2, mask_ratio: float = 0.75, *, seed: int = 0, clip_ids: ClipIds = None
    ) -> Tensor:
        """The mean over tube-masked views of the class probabilities, fp32 [B, K].   seed, clip_ids: as in tube_masks."""
        grid, device = self.check_video(video), self.device
        ids = clip_id_tensor(clip_ids, video.shape[0], "cpu")

        def run(clips: slice) -> Tensor:
            chosen = ids[clips]
            pack = sample_pack(len(chosen), views, grid, mask_ratio, seed=seed, clip_ids=chosen, device=device)
            logits = self.logits(video[clips].to(device, non_blocking=True), pack)
            return logits.float().softmax(-1).unflatten(0, (-1, views)).mean(1)

        size = micro_batch_size(views * grid[0] * kept_per_slot(grid, mask_ratio), device)
        parts = run_in_micro_batches(run, len(ids), size)
        return torch.cat(parts) if parts else torch.zeros(0, self.config.num_classes, device=device)


class EVLEnsemble(Ensembled):
    """An EVL with the interface that predict and extract know from MaskedViT; its class query is the feature."""

    def __init__(self, evl: EVL) -> None:
        super().__init__()
        self.evl = evl
        c = evl.config
        frames, height, width = c.video_size
        chans = 3 if isinstance(c.backbone, CLIPConfig) else c.backbone.in_chans
        self.config = EnsembleConfig(
            (c.num_frames, *c.grid), frames, (height, width), chans, c.num_classes, c.width, c.to_dict()
        )

    @property
    def device(self) -> torch.device:
        """Where the decoder is."""
        return self.evl.decoder.cls_token.device

    def check_video(self, video: Tensor) -> Grid:
        """The token grid of a video, or an error that says what is wrong with it."""
        return self.evl.check_video(video)

    def encode(self, video: Tensor, mask: Pack) -> Tensor:
        """The class query, [S, D]."""
        return self.evl.encode(video, mask)

    def logits(self, video: Tensor, pack: Pack) -> Tensor:
        """[S, K]."""
        return self.evl(video, pack)
