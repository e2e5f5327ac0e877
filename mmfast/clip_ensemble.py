"""A CLIP or an M2CLIP where a classifier of masked views is asked for: its class head, or classes known by texts."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .clip import CLIP
from .evl_ensemble import EnsembleConfig, Ensembled
from .m2clip import M2CLIP
from .masks import Grid, Pack, video_grid

FRAMES = 8  # of a CLIP, which takes any number


class CLIPEnsemble(Ensembled):
    """A CLIP or an M2CLIP with the interface that predict and extract know from MaskedViT; a clip's features are the mean of
    its frames'.

    texts: unit features of classes, fp32 [K, E]; without them the classes are those of an M2CLIP's head, and a CLIP has none.
    scale: of cosines. num_frames: of a CLIP, 8 by default. ValueError for texts of another width, or frames that do not fit.
    """

    texts: Tensor | None

    def __init__(
        self, model: CLIP | M2CLIP, texts: Tensor | None = None, scale: float = 100.0, num_frames: int | None = None
    ) -> None:
        super().__init__()
        clip = model.clip if isinstance(model, M2CLIP) else model
        c, own = clip.config, model.config.num_frames if isinstance(model, M2CLIP) else None
        if texts is not None and (texts.dim() != 2 or texts.shape[1] != c.embed_dim):
            raise ValueError(f"texts takes [K, {c.embed_dim}], got {tuple(texts.shape)}")
        if own is not None and num_frames not in (None, own):
            raise ValueError(f"num_frames takes {own}, the frames of this model's adapters, got {num_frames}")
        self.model, self.clip, self.scale = model, clip, scale
        self.register_buffer("texts", texts)
        frames, side = own or num_frames or FRAMES, c.image_size
        head = model.config.num_classes if isinstance(model, M2CLIP) else 0
        classes = head if texts is None else len(texts)
        grid = (frames, c.side, c.side)
        self.config = EnsembleConfig(
            grid, frames, (side, side), 3, classes, c.embed_dim, {**model.config.to_dict(), "texts": texts is not None}
        )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.clip.visual.proj.device

    def check_video(self, video: Tensor) -> Grid:
        """The token grid of a video, or an error that says what is wrong with it."""
        return video_grid(video, 3, 1, self.clip.config.patch_size)

    def encode(self, video: Tensor, mask: Pack) -> Tensor:
        """Features in the space of texts, [S, E]."""
        if isinstance(self.model, M2CLIP):
            return self.model.encode_video(video, mask).features
        return self.model.encode_image(video, mask).mean(-2)

    def logits(self, video: Tensor, pack: Pack) -> Tensor:
        """[S, K]."""
        if self.texts is not None:
            features = F.normalize(self.encode(video, pack).float(), dim=-1)
            with torch.autocast(features.device.type, enabled=False):  # too coarse for what a softmax sharpens so much
                return self.scale * (features @ self.texts.t())
        if not isinstance(self.model, M2CLIP):
            raise ValueError("a CLIP has no classes of its own: give it texts")
        return self.model.encode_video(video, pack).class_logits
