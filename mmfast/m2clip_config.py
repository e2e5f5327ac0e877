"""What M2CLIP adds to a CLIP: where adapters stand, the heads, the losses; and the published choices of them by name."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .clip_blocks import AdapterPlacement
from .clip_config import CLIPConfig
from .config import check_number, close_to
from .m2clip_losses import LossWeights


@dataclass(frozen=True)
class M2CLIPConfig:
    """Everything that fixes an M2CLIP but its weights. Raises ValueError or TypeError naming the field at fault.

    clip: the two towers.       num_frames: of every clip.      num_classes: of the class head.
    num_words: vocabulary of masked words; 0 leaves out the head that predicts them, and its block.
    vision_layers, text_layers: so many blocks, the last ones, have adapters; None: all. The text tower's last is the block for
    masked words, behind the tower's own.
    vision_before, text_before: "attn", "mlp" or both.          vision_hidden, text_hidden: an adapter's inner width.
    class_dropout: in front of the class head.                  class_scale: of cosines with the classes' texts.
    cmc_double_softmax: the classification loss as released.    weights: of the losses in the total.
    """

    clip: CLIPConfig = field(default_factory=CLIPConfig)
    num_frames: int = 8
    num_classes: int = 400
    num_words: int = 520
    vision_layers: int | None = None
    vision_before: tuple[str, ...] = ("attn",)
    vision_hidden: int = 384
    text_layers: int | None = 2
    text_before: tuple[str, ...] = ("attn",)
    text_hidden: int = 384
    class_dropout: float = 0.5
    class_scale: float = 100.0
    cmc_double_softmax: bool = False
    weights: LossWeights = field(default_factory=LossWeights)

    def __post_init__(self) -> None:
        if not isinstance(self.clip, CLIPConfig):
            raise TypeError(f"clip must be a CLIPConfig, got {type(self.clip).__name__}")
        if not isinstance(self.weights, LossWeights):
            raise TypeError(f"weights must be LossWeights, got {type(self.weights).__name__}")
        least = {"num_frames": 1, "num_classes": 1, "num_words": 0, "vision_hidden": 1, "text_hidden": 1}
        least |= {name: 0 for name in ("vision_layers", "text_layers") if getattr(self, name) is not None}
        for name, low in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        for tower, depth in (("vision", self.clip.vision_depth), ("text", self.text_blocks)):
            layers, before = getattr(self, f"{tower}_layers"), getattr(self, f"{tower}_before")
            if layers is None:
                object.__setattr__(self, f"{tower}_layers", depth)
            elif layers > depth:
                raise ValueError(f"{tower}_layers must be at most {depth}, the blocks there are, got {layers}")
            before = (before,) if isinstance(before, str) else tuple(before)
            if not before or not set(before) <= {"attn", "mlp"}:
                raise ValueError(f'{tower}_before must be "attn", "mlp" or both, got {before}')
            object.__setattr__(self, f"{tower}_before", before)
        check_number("class_scale", self.class_scale, positive=True)
        check_number("class_dropout", self.class_dropout, positive=False)
        if self.class_dropout >= 1:
            raise ValueError(f"class_dropout must be below 1, got {self.class_dropout}")
        if self.num_words and self.clip.embed_dim != self.clip.text_width:
            raise ValueError(
                f"num_words must be 0 for this CLIP: its frames' features are {self.clip.embed_dim} wide, its text tower "
                f"{self.clip.text_width}, and the block for masked words reads the one by the other"
            )

    @property
    def text_blocks(self) -> int:
        """Blocks of the text tower, the one for masked words included."""
        return self.clip.text_depth + (self.num_words > 0)

    def placement(self, tower: str) -> AdapterPlacement | None:
        """Where adapters stand in the "vision" or "text" tower; None without any."""
        depth = self.clip.vision_depth if tower == "vision" else self.text_blocks
        layers = tuple(range(depth - getattr(self, f"{tower}_layers"), depth))
        if not layers:
            return None
        kind: Any = "ted" if tower == "vision" else "text"
        return AdapterPlacement(layers, getattr(self, f"{tower}_before"), getattr(self, f"{tower}_hidden"), kind)

    @classmethod
    def preset(cls, name: str, clip: CLIPConfig | str = "clip_vit_b16", **overrides: Any) -> "M2CLIPConfig":
        """The choices of a name on a CLIP.   overrides: fields of M2CLIPConfig, None as if not given.

        "k400", "ssv2": the released scripts' placement, classes and words. "paper": adapters before attention.
        "reference": k400 with the losses as released: masked words never counted, the classification loss was of a softmax.
        """
        if name not in PRESETS:
            raise ValueError(
                f"unknown preset {name!r}{close_to(str(name), list(PRESETS))}; there are {', '.join(PRESETS)}"
            )
        given = {key: value for key, value in overrides.items() if value is not None}
        known = [f.name for f in fields(cls)]
        for key in given:
            if key not in known:
                raise ValueError(
                    f"unknown config field {key!r}{close_to(key, known)}; the fields are {', '.join(known)}"
                )
        towers = CLIPConfig.from_name(clip) if isinstance(clip, str) else clip
        return cls(**{"clip": towers, **PRESETS[name], **given})

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        data = asdict(self)
        data |= {name: list(data[name]) for name in ("vision_before", "text_before")}
        return {**data, "clip": self.clip.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "M2CLIPConfig":
        """The config of `to_dict`. ValueError for an unknown field, by its name."""
        known = [f.name for f in fields(cls)]
        for name in data:
            if name not in known:
                raise ValueError(
                    f"unknown config field {name!r}{close_to(name, known)}; the fields are {', '.join(known)}"
                )
        values = dict(data)
        if isinstance(values.get("clip"), dict):
            values["clip"] = CLIPConfig.from_dict(values["clip"])
        if isinstance(values.get("weights"), dict):
            values["weights"] = LossWeights(**values["weights"])
        return cls(**values)


_K400: dict[str, Any] = dict(
    vision_before=("mlp",), text_before=("mlp",), text_layers=2, num_classes=400, num_words=520
)
PRESETS: dict[str, dict[str, Any]] = {
    "k400": _K400,
    "ssv2": dict(
        vision_before=("attn", "mlp"), text_before=("attn", "mlp"), text_layers=None, num_classes=174, num_words=234
    ),
    "paper": {},
    "reference": {**_K400, "cmc_double_softmax": True, "weights": LossWeights(cmlm=0.0)},
}
