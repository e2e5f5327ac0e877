"""What a masked video transformer is made of: `ViTConfig`, and the names of the published sizes."""

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, Self

# Pixel statistics on px/255 (RGB: ImageNet), on flow in pixels, and on hand heatmaps, keyed by the number of channels.
_STATISTICS: dict[int, tuple[tuple[float, ...], tuple[float, ...]]] = {
    3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    2: ((0.0507, 0.4671), (10.9280, 8.6857)),
    21: ((0.3,) * 21, (0.3,) * 21),
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "qkv_bias": ("qv", "full", "none"),
    "pool": ("mean", "first"),
    "gelu": ("erf", "tanh", "quick"),
}


class JSONFields:
    """Turns a config dataclass to plain data and back."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON: tuples become lists."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}  # type: ignore[call-overload]  # self is a dataclass

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The config of `to_dict`. Fields left out take their default; an unknown one raises ValueError by its name."""
        known = [f.name for f in fields(cls)]  # type: ignore[arg-type]  # as in to_dict
        for name in data:
            if name not in known:
                raise ValueError(
                    f"unknown config field {name!r}{close_to(name, known)}; the fields are {', '.join(known)}"
                )
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**values)

    def to_json(self) -> str:
        """The config as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The config of `to_json`."""
        data = json.loads(text)
        if not isinstance(data, dict):
            raise ValueError(f"a config must be a JSON object, got {type(data).__name__}")
        return cls.from_dict(data)


@dataclass(frozen=True)
class ViTConfig(JSONFields):
    """Everything that fixes a MaskedViT but its weights. Raises ValueError or TypeError naming the field at fault.

    img_size: side, or (height, width), of a frame.     qkv_bias: "qv" (the key's is 0), "full" or "none".
    pool: "mean" over the tokens or the "first" one.    final_norm: LayerNorm over every token after the last block.
    fc_norm: LayerNorm over the pooled feature.         fc_norm_eps: norm_eps unless given.
    init_values: LayerScale's first value; 0 is none.   gelu: exact "erf", "tanh", or CLIP's "quick".
    mean, std: one value a channel; uint8 video becomes (px/255 - mean) / std, which only RGB has a meaning for.
    Unless given they are ImageNet's for 3 channels, optical flow's for 2, hand heatmaps' for 21, and 0 and 1 otherwise.
    adapter_hidden: inner width of the TED-Adapters before "attn", "mlp" or both (adapter_before) in the blocks of
    adapter_layers, None for all; 0 is no adapters.
    """

    img_size: int | tuple[int, int] = 224
    patch_size: int = 16
    in_chans: int = 3
    num_frames: int = 16
    tubelet_size: int = 2
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: Literal["qv", "full", "none"] = "qv"
    norm_eps: float = 1e-6
    fc_norm_eps: float = None  # type: ignore[assignment]  # filled in below: it follows norm_eps
    num_classes: int = 0
    pool: Literal["mean", "first"] = "mean"
    final_norm: bool = False
    fc_norm: bool = True
    init_values: float = 0.0
    drop_path_rate: float = 0.0
    head_drop_rate: float = 0.0
    mean: tuple[float, ...] = None  # type: ignore[assignment]  # filled in below: it follows in_chans
    std: tuple[float, ...] = None  # type: ignore[assignment]  # as mean
    gelu: Literal["erf", "tanh", "quick"] = "erf"
    adapter_hidden: int = 0
    adapter_before: tuple[str, ...] = ("attn",)
    adapter_layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _integers(self)
        if self.fc_norm_eps is None:
            object.__setattr__(self, "fc_norm_eps", self.norm_eps)
        mean, std = _STATISTICS.get(self.in_chans, ((0.0,) * self.in_chans, (1.0,) * self.in_chans))
        for name, default in (("mean", mean), ("std", std)):
            given = getattr(self, name)
            object.__setattr__(self, name, default if given is None else per_channel(name, given, self.in_chans))
        _numbers(self)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("final_norm", "fc_norm"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads must divide embed_dim {self.embed_dim}, got {self.num_heads}")
        if self.num_frames % self.tubelet_size:
            raise ValueError(
                f"num_frames must be a multiple of tubelet_size {self.tubelet_size}, got {self.num_frames}"
            )
        _adapters(self)

    @property
    def frame_size(self) -> tuple[int, int]:
        """Height and width of a frame."""
        return (self.img_size, self.img_size) if isinstance(self.img_size, int) else self.img_size

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along time, height and width."""
        height, width = self.frame_size
        return self.num_frames // self.tubelet_size, height // self.patch_size, width // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Tokens of the full grid."""
        return math.prod(self.grid)

    @property
    def mlp_dim(self) -> int:
        """Width of the hidden layer of the MLP."""
        # The ratio of a checkpoint is a quotient: 1408 * (6144 / 1408) may fall a hair short of 6144.
        return int(self.embed_dim * self.mlp_ratio + 1e-6)


def _integers(config: ViTConfig) -> None:
    names = ["patch_size", "in_chans", "num_frames", "tubelet_size", "embed_dim", "depth", "num_heads"]
    size = config.img_size
    if isinstance(size, (tuple, list)):
        object.__setattr__(config, "img_size", tuple(size))
        if len(size) != 2:
            raise ValueError(f"img_size must be an int or (height, width), got {tuple(size)}")
        sides = tuple(size)
    else:
        sides = (size,)
    given = [(name, getattr(config, name), 1) for name in names]
    given += [(name, getattr(config, name), 0) for name in ("num_classes", "adapter_hidden")]
    for name, value, least in [*given, *(("img_size", s, 1) for s in sides)]:
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    for side in sides:
        if side % config.patch_size:
            raise ValueError(f"img_size must be a multiple of patch_size {config.patch_size}, got {config.img_size}")


def _adapters(config: ViTConfig) -> None:
    before, layers = config.adapter_before, config.adapter_layers
    before = (before,) if isinstance(before, str) else tuple(before)
    if not before or not set(before) <= {"attn", "mlp"}:
        raise ValueError(f'adapter_before must be "attn", "mlp" or both, got {before!r}')
    object.__setattr__(config, "adapter_before", tuple(half for half in ("attn", "mlp") if half in before))
    if layers is None:
        return
    numbers = tuple(layers)
    if not numbers or not all(type(n) is int and 0 <= n < config.depth for n in numbers):
        raise ValueError(f"adapter_layers must be numbers of blocks, 0..{config.depth - 1}, or None, got {numbers}")
    object.__setattr__(config, "adapter_layers", tuple(sorted(set(numbers))))


def _numbers(config: ViTConfig) -> None:
    positive = {"norm_eps", "fc_norm_eps", "mlp_ratio"}
    for name in ("mlp_ratio", "norm_eps", "fc_norm_eps", "init_values", "drop_path_rate", "head_drop_rate"):
        value = getattr(config, name)
        check_number(name, value, name in positive)
        if name.endswith("_rate") and value >= 1:
            raise ValueError(f"{name} must be below 1, got {value}")
    if config.mlp_dim < 1:
        raise ValueError(f"mlp_ratio {config.mlp_ratio} leaves no hidden layer at embed_dim {config.embed_dim}")


def check_number(name: str, value: Any, positive: bool) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(f"{name} must be finite and {'above' if positive else 'at least'} 0, got {value}")


def per_channel(name: str, given: Any, in_chans: int) -> tuple[float, ...]:
    if not isinstance(given, (tuple, list)) or not all(isinstance(v, (int, float)) for v in given):
        raise TypeError(f"{name} must be a tuple of {in_chans} numbers, one a channel, got {given!r}")
    if len(given) != in_chans:
        raise ValueError(f"{name} must have in_chans = {in_chans} values, got {len(given)}")
    if not all(math.isfinite(v) for v in given) or (name == "std" and min(given) <= 0):
        raise ValueError(f"{name} must be finite{' and above 0' if name == 'std' else ''}, got {tuple(given)}")
    return tuple(float(v) for v in given)


def close_to(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


@dataclass(frozen=True)
class MAEConfig(ViTConfig):
    """Everything that fixes a MaskedAutoencoder but its weights: a ViTConfig for the encoder, and the decoder.

    The encoder keeps its final norm. num_classes above 0 adds MM-CDFSL's class branch: mean over the visible tokens, fc_norm,
    dropout (head_drop_rate), head. normalize_target: whether the loss normalises each patch and channel (VideoMAE).
    """

    final_norm: bool = True
    decoder_embed_dim: int = 384
    decoder_depth: int = 4
    decoder_num_heads: int = 6
    decoder_mlp_ratio: float = 4.0
    decoder_norm_eps: float = None  # type: ignore[assignment]  # of the norm before the head; norm_eps unless given
    normalize_target: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decoder_norm_eps is None:
            object.__setattr__(self, "decoder_norm_eps", self.norm_eps)
        if self.pool != "mean":
            raise ValueError(f'pool must be "mean" in a masked autoencoder, got {self.pool!r}')
        if not self.final_norm:
            raise ValueError("final_norm must be True: the decoder reads normalised tokens")
        if not isinstance(self.normalize_target, bool):
            raise TypeError(f"normalize_target must be True or False, got {self.normalize_target!r}")
        _ = self.decoder  # ViTConfig checks its numbers

    @property
    def encoder(self) -> ViTConfig:
        """The encoder alone: no class branch."""
        own = {f.name: getattr(self, f.name) for f in fields(ViTConfig)}
        return ViTConfig(**{**own, "num_classes": 0, "fc_norm": False})

    @property
    def decoder(self) -> ViTConfig:
        """The decoder's blocks, as a ViT of its width over the same tokens."""
        for name in ("decoder_mlp_ratio", "decoder_norm_eps"):
            check_number(name, getattr(self, name), positive=True)
        for name in ("decoder_embed_dim", "decoder_depth", "decoder_num_heads"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.decoder_embed_dim % self.decoder_num_heads:
            raise ValueError(
                f"decoder_num_heads must divide decoder_embed_dim {self.decoder_embed_dim}, got {self.decoder_num_heads}"
            )
        return replace(
            self.encoder,
            embed_dim=self.decoder_embed_dim,
            depth=self.decoder_depth,
            num_heads=self.decoder_num_heads,
            mlp_ratio=self.decoder_mlp_ratio,
            drop_path_rate=0.0,
            adapter_hidden=0,
            adapter_layers=None,
        )

    @property
    def patch_dim(self) -> int:
        """Values the decoder predicts for a token: C * tt * p * p."""
        return self.in_chans * self.tubelet_size * self.patch_size**2


# -- names of the published sizes --------------------------------------------------------------------------------------

_SIZES: dict[str, dict[str, Any]] = {
    "small": dict(embed_dim=384, depth=12, num_heads=6),
    "base": dict(embed_dim=768, depth=12, num_heads=12),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
    "huge": dict(embed_dim=1280, depth=32, num_heads=16),
    "giant": dict(embed_dim=1408, depth=40, num_heads=16, mlp_ratio=48 / 11, patch_size=14),
}
# MM-CDFSL's classifier: the encoder's norm stays, fc_norm follows the mean, and every eps is torch's default.
_MMCDFSL: dict[str, Any] = {**_SIZES["small"], "final_norm": True, "norm_eps": 1e-5}
_NAMES: dict[str, dict[str, Any]] = {
    **{f"videomae_{size}_patch{f.get('patch_size', 16)}_224": f for size, f in _SIZES.items()},
    "mmcdfsl_small_rgb": _MMCDFSL,
    "mmcdfsl_small_flow": {**_MMCDFSL, "in_chans": 2},
    "mmcdfsl_small_pose": {**_MMCDFSL, "in_chans": 21, "patch_size": 4, "img_size": 56},
}
_ALIASES: dict[str, str] = {
    alias: f"videomae_{size}_patch{f.get('patch_size', 16)}_224"
    for size, f in _SIZES.items()
    for alias in (f"vit_{size}_patch{f.get('patch_size', 16)}_224", f"videomae_{size}", f"vit_{size}")
}


# The decoder is about half as wide as the encoder; its depth is what the published pre-training scripts set.
_DECODERS: dict[str, dict[str, Any]] = {
    "small": dict(decoder_embed_dim=192, decoder_num_heads=3),
    "base": dict(decoder_embed_dim=384, decoder_num_heads=6),
    "large": dict(decoder_embed_dim=512, decoder_num_heads=8),
    "huge": dict(decoder_embed_dim=640, decoder_num_heads=8),
}
_MMCDFSL_PRETRAIN: dict[str, Any] = {**_SIZES["small"], **_DECODERS["small"], "head_drop_rate": 0.5}
_MAE_NAMES: dict[str, dict[str, Any]] = {
    **{f"pretrain_videomae_{size}_patch16_224": _SIZES[size] | fields for size, fields in _DECODERS.items()},
    "pretrain_mmcdfsl_small_rgb": _MMCDFSL_PRETRAIN,
    "pretrain_mmcdfsl_small_flow": {**_MMCDFSL_PRETRAIN, "in_chans": 2},
    "pretrain_mmcdfsl_small_pose": {**_MMCDFSL_PRETRAIN, "in_chans": 21, "patch_size": 4, "img_size": 56},
}


def list_models() -> list[str]:
    """Every name of a MaskedViT or MaskedAutoencoder that `from_name` takes, aliases too, sorted."""
    return sorted({*_NAMES, *_ALIASES, *_MAE_NAMES})


def from_name(name: str, **overrides: Any) -> ViTConfig:
    """The config of a published size, any field overridden. An unknown name raises ValueError with the close ones."""
    known = sorted({*_NAMES, *_ALIASES})
    if name in _MAE_NAMES:
        raise ValueError(f"{name!r} names a MaskedAutoencoder, not a MaskedViT")
    if name not in known:
        raise ValueError(f"unknown model {name!r}{close_to(str(name), known)}; the names are {', '.join(known)}")
    return ViTConfig.from_dict({**_NAMES[_ALIASES.get(name, name)], **overrides})


def mae_from_name(name: str, **overrides: Any) -> MAEConfig:
    """As from_name, of a published pre-training model."""
    known = sorted(_MAE_NAMES)
    if name not in known:
        raise ValueError(f"unknown model {name!r}{close_to(str(name), known)}; the names are {', '.join(known)}")
    return MAEConfig.from_dict({**_MAE_NAMES[name], **overrides})


# Heads of the published widths whose head width is not 64.
_HEADS = {f["embed_dim"]: f["num_heads"] for f in _SIZES.values()}


def usual_num_heads(embed_dim: int) -> int | None:
    """Heads of the published model of this width, else one for every 64 channels; None where 64 does not divide it."""
    return _HEADS.get(embed_dim) or (embed_dim // 64 if embed_dim % 64 == 0 else None)
