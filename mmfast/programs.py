"""The models in torch's own operators alone, as package.py writes them: heads on the towers of program_towers.py.

A program looks at P tube-masked views of every clip, or at whole ones, and averages their probabilities.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfast_kernels.pool import ensemble_probs_ref, segment_mean_norm_ref
from mmfast_kernels.temporal import temporal_cross_attention_ref

from .adapters import TemporalAdapter
from .clip import CLIP
from .clip_vision import CLIPVision
from .evl import EVL
from .evl_decoder import DecoderLayer, OffsetTables
from .layers import LayerNorm
from .m2clip import M2CLIP
from .masks import Grid
from .program_towers import Cut, Tower, Views, gelu_of, norm_of
from .vit import MaskedViT


class Program(nn.Module):
    """Probabilities of clips: the mean over their views.   size: frames, height and width. A subclass has `scores`."""

    def __init__(
        self,
        tower: MaskedViT | CLIPVision,
        grid: Grid,
        size: tuple[int, int, int],
        views: int,
        mask_ratio: float,
        keep: int | None,
    ) -> None:
        super().__init__()
        self.cut = Views(grid, views, mask_ratio, keep)
        self.tower = Tower(tower, grid)
        self.shape = (tower.config.in_chans if isinstance(tower, MaskedViT) else 3, *size)

    def forward(self, video: Tensor, clip_ids: Tensor, seed: Tensor) -> Tensor:
        """video: [B, C, F, H, W].   clip_ids: int64 [B].   seed: int64 [].   Returns fp32 [B, K]."""
        cut = self.cut(clip_ids, seed)
        scores = self.scores(self.tower.embed(video, cut), cut)
        return ensemble_probs_ref(scores.unflatten(0, (-1, self.cut.views)))

    def scores(self, x: Tensor, cut: Cut) -> Tensor:
        """Logits [S, K] of embedded tokens."""
        raise NotImplementedError


class EnsembleProgram(Program):
    """MaskedViT.ensemble on clips of the model's own size, with equally long views."""

    def __init__(self, model: MaskedViT, views: int, mask_ratio: float, keep: int | None) -> None:
        c = model.config
        super().__init__(model, c.grid, (c.num_frames, *c.frame_size), views, mask_ratio, keep)
        self.pool, self.norm, self.fc_norm, self.head = c.pool, model.norm, model.fc_norm, model.head
        self.eval()

    def scores(self, x: Tensor, cut: Cut) -> Tensor:
        for block in self.tower.blocks:
            x, _, _ = block(x, cut.near)
        return self.head(self._pooled(x))

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pool == "first":
            x = x[:, 0]
            for norm in (self.norm, self.fc_norm):
                x = x if norm is None else norm_of(norm, x)
            return x
        norms = _of("", self.fc_norm) | _of("token_", self.norm)
        return segment_mean_norm_ref(x.flatten(0, 1), None, length=x.shape[1], **norms)


class _FrameProgram(Program):
    """Of a CLIP's frames: their class tokens."""

    def __init__(self, visual: CLIPVision, num_frames: int, views: int, mask_ratio: float, keep: int | None) -> None:
        side, pixels = visual.config.side, visual.config.image_size
        super().__init__(visual, (num_frames, side, side), (num_frames, pixels, pixels), views, mask_ratio, keep)
        self.ln_post = visual.ln_post

    def frames(self, x: Tensor, cut: Cut) -> Tensor:
        """[S, F, D], before ln_post."""
        last = len(self.tower.blocks) - 1
        for i, block in enumerate(self.tower.blocks):
            x, _, _ = block(x, cut.near, i == last)
        return x.view(-1, self.tower.slots, x.shape[-1])


class ClassProgram(_FrameProgram):
    """An M2CLIP's class head."""

    def __init__(self, model: M2CLIP, views: int, mask_ratio: float, keep: int | None) -> None:
        super().__init__(model.clip.visual, model.config.num_frames, views, mask_ratio, keep)
        self.head = model.adapter_fc
        self.eval()

    def scores(self, x: Tensor, cut: Cut) -> Tensor:
        return self.head(norm_of(self.ln_post, self.frames(x, cut).mean(1)))


class TextProgram(_FrameProgram):
    """A CLIP's or an M2CLIP's cosines with texts, whose features are constants.   texts: unit features, fp32 [K, E]."""

    texts: Tensor
    to_texts: Tensor

    def __init__(
        self,
        model: CLIP | M2CLIP,
        texts: Tensor,
        scale: float,
        num_frames: int,
        views: int,
        mask_ratio: float,
        keep: int | None,
    ) -> None:
        visual = (model.clip if isinstance(model, M2CLIP) else model).visual
        super().__init__(visual, num_frames, views, mask_ratio, keep)
        self.scale = scale
        self.register_buffer("texts", texts.detach().clone(), persistent=False)
        self.register_buffer("to_texts", visual.proj.detach().t().contiguous(), persistent=False)
        adapts = isinstance(model, M2CLIP) and model.use_vision_adapters
        self.over_time: TemporalAdapter | None = model.t_adapter if adapts else None  # type: ignore[assignment]  # an M2CLIP's
        self.eval()

    def scores(self, x: Tensor, cut: Cut) -> Tensor:
        frames = F.linear(norm_of(self.ln_post, self.frames(x, cut)), self.to_texts)
        if self.over_time is not None:
            frames = self.over_time(frames.flatten(0, 1), self.tower.slots).view(frames.shape)
        features = F.normalize(frames.mean(1).to(self.texts.dtype), dim=-1)
        return self.scale * (features @ self.texts.t())


class EVLProgram(Program):
    """An EVL, of either backbone."""

    def __init__(self, model: EVL, views: int, mask_ratio: float, keep: int | None) -> None:
        c = model.config
        super().__init__(model.backbone, (c.num_frames, *c.grid), c.video_size, views, mask_ratio, keep)
        self.decoder, self.proj = model.decoder, model.proj
        self.eval()

    def scores(self, x: Tensor, cut: Cut) -> Tensor:
        blocks, layers = list(self.tower.blocks), len(self.decoder.decoder_layers)
        slots, tokens = self.tower.slots, self.tower.first + cut.cells.shape[1]
        query = self.decoder.start(cut.cells.shape[0])
        for i, block in enumerate(blocks, layers - len(blocks)):
            x, q, k = block(x, cut.near)
            if i < 0:
                continue
            q, k = (t.reshape(-1, slots, tokens, *t.shape[2:])[:, :, self.tower.first :] for t in (q, k))
            query = self._layer(i, query, self._read(i, x.reshape(-1, slots, tokens, x.shape[-1]), q, k, cut))
        norm, _, head = self.proj
        return head(norm_of(norm, query))

    def _read(self, i: int, out: Tensor, q: Tensor, k: Tensor, cut: Cut) -> Tensor:
        """What layer i reads, [S, F * n, D]; as Decoder.temporal has it."""
        decoder = self.decoder
        y = out = out.to(torch.promote_types(out.dtype, decoder.cls_token.dtype))
        if decoder.temporal_conv is not None:
            conv = decoder.temporal_conv[i]
            assert isinstance(conv, nn.Conv1d)
            assert conv.bias is not None
            padded = F.pad(out, (0, 0, 0, 0, 1, 1))  # spelled out: compiled, the convolution of such a view was wrong
            y = out + conv.bias + sum(padded[:, t : t + out.shape[1]] * conv.weight[:, 0, t] for t in range(3))
        if decoder.temporal_pos_embed is not None:
            y = y + decoder.temporal_pos_embed[i][:, None].to(y.dtype)
        if decoder.cross_attention is not None:
            tables = decoder.cross_attention[i]
            assert isinstance(tables, OffsetTables)
            wide = torch.promote_types(q.dtype, torch.float32)
            q, k = q.to(wide), k.to(wide)
            taken = temporal_cross_attention_ref(q, k, tables.w1, tables.w2, decoder.grid, cut.cells)
            y = y + F.pad(taken.to(y.dtype), (0, 0, self.tower.first, 0))
        return y.flatten(1, 2)

    def _layer(self, i: int, x: Tensor, y: Tensor) -> Tensor:
        layer = self.decoder.decoder_layers[i]
        assert isinstance(layer, DecoderLayer)
        x = x + layer.attn(norm_of(layer.norm1, x), norm_of(layer.norm3, y))
        h = F.linear(norm_of(layer.norm2, x), layer.mlp.fc1.weight, layer.mlp.fc1.bias)
        return x + F.linear(gelu_of(h, "quick"), layer.mlp.fc2.weight, layer.mlp.fc2.bias)


def _of(prefix: str, norm: LayerNorm | None) -> dict[str, Any]:
    return {} if norm is None else {f"{prefix}{name}": getattr(norm, name) for name in ("weight", "bias", "eps")}


Packaged = MaskedViT | EVL | M2CLIP


def program_of(model: Packaged, views: int, mask_ratio: float, keep: int | None) -> Program:
    """The program of a model's own classes."""
    if isinstance(model, EVL):
        return EVLProgram(model, views, mask_ratio, keep)
    kind = ClassProgram if isinstance(model, M2CLIP) else EnsembleProgram
    return kind(model, views, mask_ratio, keep)  # type: ignore[arg-type]  # each its own
