"""M2CLIP: a frozen CLIP with TED-Adapters and text adapters, and four heads (M2-CLIP, AAAI 2024)."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import profiling
from .adapters import TemporalAdapter
from .clip import CLIP
from .layers import Linear
from .m2clip_config import M2CLIPConfig
from .m2clip_losses import IGNORED, class_cosines, cmc_loss, cmlm_loss, contrastive_loss, vc_loss
from .m2clip_words import MaskedRows, WordHead, attend_frames, masked_rows
from .vit import Mask, PackedTokens

if TYPE_CHECKING:
    from .checkpoints import LoadReport


class EncodedVideo(NamedTuple):
    """features: [B, E]. frame_features: [B, F, E]. class_logits: [B, K].   [B, P, ...] for a [B, P, N] mask."""

    features: Tensor
    frame_features: Tensor
    class_logits: Tensor


class EncodedText(NamedTuple):
    """features: [L, E]. token_states: [L, context, W], before ln_final, 0 behind the end of a text."""

    features: Tensor
    token_states: Tensor


class M2CLIP(nn.Module):
    """M2-CLIP (arXiv 2401.11649): video and text features, class logits and masked words from an adapted CLIP.

    video: [B, 3, F, H, W] on any strides, float and normalised already, or uint8; of config.num_frames frames, square. token_ids:
    int64 [L, up to 77], best kept on the CPU: where they lie on a GPU, its lengths are waited for. mask: as CLIPVision takes it.
    Only adapters and heads train (parameters with "adapter" in their names); the CLIP's own require no gradient.
    """

    load_report: "LoadReport | None" = None

    def __init__(self, config: M2CLIPConfig) -> None:
        super().__init__()
        self.config = config
        c = config.clip
        self.clip = CLIP(
            c,
            vision_adapters=config.placement("vision"),
            text_adapters=config.placement("text"),
            extra_text_blocks=int(config.num_words > 0),
        )
        self.t_adapter = TemporalAdapter(c.embed_dim, max(c.embed_dim // 2, 1))
        self.adapter_dropout = nn.Dropout(config.class_dropout)
        self.adapter_fc = Linear(c.vision_width, config.num_classes)
        nn.init.normal_(self.adapter_fc.weight, std=0.02)
        nn.init.zeros_(self.adapter_fc.bias)
        self.mlm_adapter = WordHead(c.text_width, config.num_words) if config.num_words else None
        self.use_vision_adapters = True
        self._label_cache: dict[Any, Tensor] = {}
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("adapter" in name)

    @classmethod
    def from_name(cls, name: str, preset: str = "paper", **overrides: Any) -> "M2CLIP":
        """A published CLIP size with random weights.   preset, overrides: as M2CLIPConfig.preset takes them."""
        return cls(M2CLIPConfig.preset(preset, name, **overrides))

    @classmethod
    def from_pretrained(
        cls,
        source: Any,
        num_frames: int | None = None,
        *,
        adapters: Any = None,
        vision_num_heads: int | None = None,
        text_num_heads: int | None = None,
        preset: str = "paper",
        trust: bool = False,
        **overrides: Any,
    ) -> "M2CLIP":
        """A model from a CLIP file and M2-CLIP's adapters, from both in one, or a folder of mmfast. In eval mode.

        source: a CLIP of any dialect, path or state dict, whose adapters and heads start anew where no file holds them; or a
        pair of it and the adapters. adapters: a checkpoint whose tensors tell where adapters stand and how wide they are.
        num_frames: 8 by default. preset: what the files do not tell. overrides: fields of M2CLIPConfig or CLIPConfig. What was
        loaded stands in `load_report`.
        """
        from .checkpoints.m2clip import load_pretrained_m2clip

        if isinstance(source, (tuple, list)):
            if len(source) != 2 or adapters is not None:
                raise ValueError(f"source must be a CLIP, or a pair of one and its adapters, got {len(source)} parts")
            source, adapters = source
        heads = {"vision_num_heads": vision_num_heads, "text_num_heads": text_num_heads}
        model, report = load_pretrained_m2clip(
            source, adapters, preset=preset, trust=trust, num_frames=num_frames, **heads, **overrides
        )
        model.load_report = report
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model.safetensors and config.json, each whole or not at all."""
        from .checkpoints.save import write_folder

        write_folder(self.state_dict(), "M2CLIP", self.config.to_dict(), folder)

    def save_adapters(self, path: str | Path) -> None:
        """Write what trains, in M2-CLIP's names and form of file; `from_pretrained(clip, adapters=path)` reads it."""
        from .checkpoints.m2clip import save_adapters

        save_adapters(self, path)

    def forward(self, video: Tensor, mask: Mask = None) -> Tensor:
        """Class logits: [B, K]; [B, P, K] for a [B, P, N] mask."""
        return self.encode_video(video, mask).class_logits

    def encode_video(self, video: Tensor, mask: Mask = None) -> EncodedVideo:
        """Features, features of every frame, and class logits."""
        self._check_video(video)
        visual = self.clip.visual
        tokens = visual.forward_frames(video, mask)
        with profiling.range("heads"):
            frames = visual.project(visual.head(tokens))
            if self.use_vision_adapters:
                flat = frames.reshape(-1, frames.shape[-1])
                frames = self.t_adapter(flat, num_frames=frames.shape[-2]).view(frames.shape)
            classes = self.adapter_fc(self.adapter_dropout(visual.head(tokens.mean(-2))))
        return EncodedVideo(frames.mean(-2), frames, classes)

    def encode_text(self, token_ids: Tensor) -> EncodedText:
        """Features of the texts, and the states of their tokens."""
        tokens = self.clip.text.forward_tokens(token_ids)
        return EncodedText(self.clip.text.features(tokens), self.clip.text.unpack(tokens))

    def losses(
        self,
        video: Tensor,
        token_ids: Tensor,
        labels: Tensor,
        class_token_ids: Tensor,
        mlm_labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        gather: bool = False,
    ) -> dict[str, Tensor]:
        """The four losses and their total, each a scalar: contrastive, cmc, cmlm, vc, total.

        token_ids: [B, context], each clip's caption, perhaps with words masked. labels: int [B], class numbers. class_token_ids:
        [K, context], every class's prompt. mlm_labels: [B, context], at a masked word its id, else -100; without any word masked,
        or None, cmlm is 0. mask: bool [B, N], True = removed. gather: the contrastive loss against the clips of all ranks.
        Every different text is encoded once, all in one pack. Ids and labels on the CPU spare waiting for the device.
        """
        self._check_video(video)
        labels = self._check_labels(len(video), token_ids, labels, class_token_ids)
        host_ids, row_of = unique_rows(torch.cat((class_token_ids.cpu(), token_ids.cpu())))
        classes, captions = row_of.split((len(class_token_ids), len(token_ids)))
        words = self._masked_rows(mlm_labels, host_ids, captions)
        encoded = self.encode_video(video, mask)
        device = encoded.features.device
        labels = labels.to(device, non_blocking=True)
        tokens = self.clip.text.forward_tokens(host_ids)
        texts = self.clip.text.features(tokens)
        class_texts, caption_texts = (
            F.embedding(rows.to(device, non_blocking=True), texts) for rows in (classes, captions)
        )
        c = self.config
        losses = {
            "contrastive": contrastive_loss(
                encoded.features, caption_texts, labels, self.clip.logit_scale.float().exp(), gather=gather
            ),
            "cmc": cmc_loss(encoded.features, class_texts, labels, c.class_scale, double_softmax=c.cmc_double_softmax),
            "cmlm": self._cmlm(tokens, encoded.frame_features, words),
            "vc": vc_loss(encoded.class_logits, labels),
        }
        return losses | {"total": c.weights.total(losses)}

    def zero_shot(self, video: Tensor, class_token_ids: Tensor, mask: Mask = None) -> Tensor:
        """Probabilities over any set of classes, fp32: [B, K']; [B, P, K'] for a [B, P, N] mask.

        class_token_ids: [K', context], or [R, K', context] for R prompts a class, whose unit features are averaged.
        """
        features = self.encode_video(video, mask).features
        return self.class_scores(features, class_token_ids).softmax(-1)

    def class_scores(self, features: Tensor, class_token_ids: Tensor) -> Tensor:
        """class_scale times the cosines of video features [..., E] with the classes' texts: fp32 [..., K']."""
        texts = self.label_features(class_token_ids)
        flat = features.reshape(-1, features.shape[-1])
        return class_cosines(flat, texts, self.config.class_scale).view(*features.shape[:-1], len(texts))

    def label_features(self, class_token_ids: Tensor) -> Tensor:
        """Unit features of the classes' texts, [K', E], kept in eval mode without gradients until a parameter changes."""
        keep = not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
        key = self._text_key(class_token_ids) if keep else None
        if key is not None and key in self._label_cache:
            return self._label_cache[key]
        ids = class_token_ids if class_token_ids.dim() == 3 else class_token_ids[None]
        texts = self.clip.text(ids.flatten(0, 1)).unflatten(0, ids.shape[:2])
        features = F.normalize(F.normalize(texts.float(), dim=-1).mean(0), dim=-1)
        if key is not None:
            self._label_cache = {key: features}  # the last set of classes: evaluation goes through one after another
        return features

    def enable_adapters(self, *, vision: bool | None = None, text: bool | None = None) -> None:
        """Switch the adapters of a tower on or off, as zero-shot tests of M2-CLIP want; None leaves it as it is.

        Without a tower's adapters it is the CLIP's own. The class head and the word head stay.
        """
        if vision is not None:
            self.use_vision_adapters = vision
            self.clip.visual.transformer.enable_adapters(vision)
        if text is not None:
            self.clip.text.transformer.enable_adapters(text)

    def param_groups(self, lr: float, weight_decay: float = 0.01, text_lr_scale: float = 0.5) -> list[dict[str, Any]]:
        """What trains, in groups for an optimiser: text adapters at a share of lr, no weight decay on biases.

        Each group has name, params, lr, lr_scale (which lr contains already) and weight_decay.
        """
        groups: dict[str, dict[str, Any]] = {}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            scale = text_lr_scale if "textad_" in name else 1.0
            decay = 0.0 if name.rpartition(".")[2] == "bias" else weight_decay
            key = f"{'text_' if 'textad_' in name else ''}{'no_decay' if decay == 0.0 else 'decay'}"
            about = {"name": key, "params": [], "lr": lr * scale, "lr_scale": scale, "weight_decay": decay}
            groups.setdefault(key, about)["params"].append(parameter)
        return list(groups.values())

    def num_trainable(self) -> int:
        """How many numbers train."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def set_grad_checkpointing(self, enable: bool = True, what: str = "block") -> None:
        """As MaskedViT's, of both towers."""
        self.clip.set_grad_checkpointing(enable, what)

    def train(self, mode: bool = True) -> "M2CLIP":
        self._label_cache = {}
        return super().train(mode)

    @property
    def mean(self) -> tuple[float, ...]:
        """Per channel, on px/255: what uint8 pixels are normalised with."""
        return self.clip.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Per channel, on px/255: what uint8 pixels are normalised with."""
        return self.clip.std

    # -- inside ------------------------------------------------------------------------------------------------

    def _cmlm(self, tokens: PackedTokens, frames: Tensor, words: MaskedRows | None) -> Tensor:
        if words is None or self.mlm_adapter is None:
            return frames.new_zeros((), dtype=torch.promote_types(frames.dtype, torch.float32))
        words = words.to(frames.device)
        text = self.clip.text
        states = F.embedding(words.rows, tokens.tokens)
        keys = frames.index_select(0, words.clips)
        block = text.transformer.resblocks[self.config.clip.text_depth]
        states = attend_frames(block, states, keys, words)
        return cmlm_loss(self.mlm_adapter(text.ln_final(states, states.dtype)), words.labels)

    def _masked_rows(self, mlm_labels: Tensor | None, host_ids: Tensor, captions: Tensor) -> MaskedRows | None:
        if mlm_labels is None:
            return None
        if self.mlm_adapter is None:
            raise ValueError("mlm_labels is given to a model without the head for masked words (num_words=0)")
        shape = (len(captions), host_ids.shape[1])
        if not isinstance(mlm_labels, Tensor) or tuple(mlm_labels.shape) != shape or mlm_labels.is_floating_point():
            got = tuple(mlm_labels.shape) if isinstance(mlm_labels, Tensor) else type(mlm_labels).__name__
            raise ValueError(f"mlm_labels must be integers of token_ids' shape {shape}, got {got}")
        return masked_rows(mlm_labels.cpu().long(), host_ids, captions, self.config.num_words)

    def _check_video(self, video: Tensor) -> None:
        if not isinstance(video, Tensor) or video.dim() != 5:
            got = tuple(video.shape) if isinstance(video, Tensor) else type(video).__name__
            raise ValueError(f"video must be [B, 3, F, H, W], got {got}")
        frames, height, width = video.shape[2:]
        if frames != self.config.num_frames:
            raise ValueError(f"video has {frames} frames; the adapters of this model take {self.config.num_frames}")
        if height != width:
            raise ValueError(f"video is {height} x {width}; M2-CLIP takes square frames")

    def _check_labels(self, batch: int, token_ids: Tensor, labels: Tensor, class_token_ids: Tensor) -> Tensor:
        for name, ids in (("token_ids", token_ids), ("class_token_ids", class_token_ids)):
            if not isinstance(ids, Tensor) or ids.dim() != 2:
                got = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
                raise ValueError(f"{name} must be an integer tensor [L, context], got {got}")
        classes = self.config.num_classes
        if len(class_token_ids) != classes:
            raise ValueError(f"class_token_ids must hold {classes} texts, one a class, got {len(class_token_ids)}")
        if len(token_ids) != batch or token_ids.shape[1] != class_token_ids.shape[1]:
            wanted = (batch, class_token_ids.shape[1])
            raise ValueError(f"token_ids must be {wanted}, one text a clip, got {tuple(token_ids.shape)}")
        if not isinstance(labels, Tensor) or labels.shape != (batch,) or labels.dtype not in (torch.int64, torch.int32):
            about = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
            raise ValueError(f"labels must be {batch} class numbers, int64, got {about}")
        if labels.device.type == "cpu" and batch:
            low, high = torch.stack(labels.aminmax()).tolist()
            if low == high == IGNORED:
                raise ValueError(f"labels are all {IGNORED}, so there is nothing to learn from; give class numbers")
            if low < 0 or high >= classes:
                raise ValueError(f"labels must lie in 0..{classes - 1}, got {low}..{high}")
        return labels.long()

    def _text_key(self, token_ids: Tensor) -> Any:
        parameters = list(self.clip.text.parameters())
        if any(p.is_inference() for p in parameters):  # they do not say when they change
            return None
        versions = tuple(p._version for p in parameters)
        where = parameters[0].device, parameters[0].dtype, torch.is_autocast_enabled(parameters[0].device.type)
        adapters = tuple(block.use_adapters for block in self.clip.text.transformer.resblocks)
        return tuple(token_ids.shape), token_ids.cpu().numpy().tobytes(), versions, where, adapters


def unique_rows(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The different rows of ids [L, n] in the order they come, and which of them each row is: int64 [L]. On the CPU."""
    found: dict[bytes, int] = {}
    first: list[int] = []
    row_of = []
    for i, row in enumerate(ids.contiguous().numpy()):
        number = found.setdefault(row.tobytes(), len(first))
        if number == len(first):
            first.append(i)
        row_of.append(number)
    return ids[torch.tensor(first, dtype=torch.int64)], torch.tensor(row_of, dtype=torch.int64)
