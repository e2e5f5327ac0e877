"""What EVL's decoder adds to a frozen backbone: which layers it reads, its temporal modules, its head."""

from dataclasses import dataclass, fields
from typing import Any

from .clip_config import CLIPConfig, list_clip_models
from .config import ViTConfig, check_number, close_to, from_name, usual_num_heads

_BACKBONES: dict[str, type[CLIPConfig] | type[ViTConfig]] = {"CLIP": CLIPConfig, "MaskedViT": ViTConfig}
_FILLED: Any = None  # a field that follows the backbone unless it is given


@dataclass(frozen=True)
class EVLConfig:
    """Everything that fixes an EVL but its weights. Raises ValueError or TypeError naming the field at fault.

    backbone: a CLIP, of which only the vision tower is there, or a MaskedViT.
    num_layers: the decoder's layers; each reads one of the backbone's last blocks.
    num_frames: frames of CLIP, time slots of a MaskedViT, that the temporal positions are of; 8, or the ViT's own.
    grid: cells (h, w) of a frame that the tables of offsets are of; the backbone's own.
    num_classes: of the head.                       decoder_num_heads, decoder_dim: of its attention; the backbone's own.
    temporal_conv, temporal_positions, temporal_cross_attention: which temporal modules there are.
    mlp_dropout, class_dropout: inside the decoder's MLPs, in front of the head.
    zero_query: the class query starts at 0, as the released code has it, and not from a normal distribution.
    """

    backbone: CLIPConfig | ViTConfig
    num_layers: int = 4
    num_frames: int = _FILLED
    grid: tuple[int, int] = _FILLED
    num_classes: int = 400
    decoder_num_heads: int = _FILLED
    decoder_dim: int = _FILLED
    decoder_mlp_ratio: float = 4.0
    temporal_conv: bool = True
    temporal_positions: bool = True
    temporal_cross_attention: bool = True
    mlp_dropout: float = 0.5
    class_dropout: float = 0.5
    norm_eps: float = 1e-5
    zero_query: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.backbone, tuple(_BACKBONES.values())):
            raise TypeError(f"backbone must be a CLIPConfig or a ViTConfig, got {type(self.backbone).__name__}")
        given = {name: getattr(self, name) for name in self._own() if getattr(self, name) is not None}
        for name, value in {**self._own(), **given}.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "grid", tuple(self.grid))
        for name in ("num_layers", "num_frames", "num_classes", "decoder_num_heads", "decoder_dim"):
            _check_count(name, getattr(self, name))
        if len(self.grid) != 2:
            raise ValueError(f"grid must be two sizes (h, w), got {self.grid}")
        for side in self.grid:
            _check_count("grid", side)
        for name in ("temporal_conv", "temporal_positions", "temporal_cross_attention", "zero_query"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("decoder_mlp_ratio", "norm_eps"):
            check_number(name, getattr(self, name), positive=True)
        for name in ("mlp_dropout", "class_dropout"):
            check_number(name, getattr(self, name), positive=False)
            if getattr(self, name) >= 1:
                raise ValueError(f"{name} must be below 1, got {getattr(self, name)}")
        if self.num_layers > self.depth:
            raise ValueError(f"num_layers must be at most {self.depth}, the backbone's blocks, got {self.num_layers}")
        if self.decoder_dim % self.decoder_num_heads:
            raise ValueError(
                f"decoder_num_heads must divide decoder_dim {self.decoder_dim}, got {self.decoder_num_heads}"
            )

    @property
    def width(self) -> int:
        """Width of the backbone's tokens, and so of the decoder's query."""
        return self.backbone.vision_width if isinstance(self.backbone, CLIPConfig) else self.backbone.embed_dim

    @property
    def depth(self) -> int:
        """Blocks of the backbone."""
        return self.backbone.vision_depth if isinstance(self.backbone, CLIPConfig) else self.backbone.depth

    @property
    def video_size(self) -> tuple[int, int, int]:
        """Frames, height and width of the videos it is for; a MaskedViT's time slot is a tubelet of frames."""
        b = self.backbone
        tubelet = 1 if isinstance(b, CLIPConfig) else b.tubelet_size
        return self.num_frames * tubelet, self.grid[0] * b.patch_size, self.grid[1] * b.patch_size

    @property
    def decoder_mlp_dim(self) -> int:
        """Width of the hidden layer of the decoder's MLPs."""
        return round(self.decoder_mlp_ratio * self.width)

    @classmethod
    def preset(
        cls, name: str, backbone: CLIPConfig | ViTConfig | str = "clip_vit_b16", **overrides: Any
    ) -> "EVLConfig":
        """The choices of a name, "paper" or "reference" (as released), on a backbone.

        backbone: a config, or a name of CLIPConfig.from_name or MaskedViT.from_name. overrides: fields, None as if not given.
        """
        if name not in PRESETS:
            raise ValueError(
                f"unknown preset {name!r}{close_to(str(name), list(PRESETS))}; there are {', '.join(PRESETS)}"
            )
        given = {key: value for key, value in overrides.items() if value is not None}
        cls._check_names(given)
        if isinstance(backbone, str):
            backbone = CLIPConfig.from_name(backbone) if backbone in list_clip_models() else from_name(backbone)
        return cls(**{"backbone": backbone, **PRESETS[name], **given})

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        kind = next(kind for kind, config in _BACKBONES.items() if isinstance(self.backbone, config))
        about = {"model": kind, "config": self.backbone.to_dict()}
        return {**data, "grid": list(self.grid), "backbone": about}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "EVLConfig":
        """The config of `to_dict`. ValueError for an unknown field, by its name."""
        cls._check_names(data)
        about = data.get("backbone")
        if not isinstance(about, dict):
            return cls(**data)
        if about.get("model") not in _BACKBONES or not isinstance(about.get("config"), dict):
            raise ValueError(f"backbone must tell its model, {' or '.join(_BACKBONES)}, and its config, got {about}")
        return cls(**{**data, "backbone": _BACKBONES[about["model"]].from_dict(about["config"])})

    @classmethod
    def _check_names(cls, data: dict[str, Any]) -> None:
        known = [f.name for f in fields(cls)]
        for name in data:
            if name not in known:
                raise ValueError(
                    f"unknown config field {name!r}{close_to(name, known)}; the fields are {', '.join(known)}"
                )

    def _own(self) -> dict[str, Any]:
        """What follows the backbone unless it is given."""
        b = self.backbone
        if isinstance(b, CLIPConfig):
            frames, grid, heads = 8, (b.side, b.side), b.vision_num_heads
        else:
            frames, grid, heads = b.grid[0], b.grid[1:], b.num_heads
        # Of another width than the backbone's, the attention has the heads usual with it.
        width = self.width if self.decoder_dim is None else self.decoder_dim
        if width != self.width and isinstance(width, int):
            heads = usual_num_heads(width) or 1
        return {"num_frames": frames, "grid": grid, "decoder_num_heads": heads, "decoder_dim": width}


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


PRESETS: dict[str, dict[str, Any]] = {"paper": {}, "reference": {"zero_query": True}}
