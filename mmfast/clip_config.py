"""The geometry of a CLIP model (Radford et al., 2103.00020), and the published names."""

from dataclasses import dataclass
from typing import Any, Literal

from .config import JSONFields, check_number, close_to, per_channel

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_GELUS = ("erf", "tanh", "quick")


@dataclass(frozen=True)
class CLIPConfig(JSONFields):
    """Everything that fixes a CLIP model but its weights. Raises ValueError or TypeError naming the field at fault.

    embed_dim: width of the common space.      image_size: side of the images the positions were learned on.
    context_length: the longest text.          vocab_size: token ids are below it; the largest ends a text.
    gelu: "quick" for OpenAI's weights, "erf" for most of open_clip's; both towers have the same.
    mean, std: what uint8 pixels are normalised with, on px/255.
    """

    embed_dim: int = 512
    image_size: int = 224
    patch_size: int = 32
    vision_width: int = 768
    vision_depth: int = 12
    vision_num_heads: int = 12
    vision_mlp_ratio: float = 4.0
    context_length: int = 77
    vocab_size: int = 49408
    text_width: int = 512
    text_depth: int = 12
    text_num_heads: int = 8
    text_mlp_ratio: float = 4.0
    gelu: Literal["erf", "tanh", "quick"] = "quick"
    norm_eps: float = 1e-5
    mean: tuple[float, ...] = _MEAN
    std: tuple[float, ...] = _STD

    def __post_init__(self) -> None:
        for name in ("embed_dim", "image_size", "patch_size", "context_length", "vocab_size"):
            _check_count(name, getattr(self, name))
        for tower in ("vision", "text"):
            for name in (f"{tower}_width", f"{tower}_depth", f"{tower}_num_heads"):
                _check_count(name, getattr(self, name))
            check_number(f"{tower}_mlp_ratio", getattr(self, f"{tower}_mlp_ratio"), positive=True)
            width, heads = getattr(self, f"{tower}_width"), getattr(self, f"{tower}_num_heads")
            if width % heads:
                raise ValueError(f"{tower}_num_heads must divide {tower}_width {width}, got {heads}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size must be a multiple of patch_size {self.patch_size}, got {self.image_size}")
        check_number("norm_eps", self.norm_eps, positive=True)
        if self.gelu not in _GELUS:
            raise ValueError(f"gelu must be one of {', '.join(_GELUS)}, got {self.gelu!r}")
        for name in ("mean", "std"):
            object.__setattr__(self, name, per_channel(name, getattr(self, name), 3))

    @property
    def side(self) -> int:
        """Patches along a side of an image."""
        return self.image_size // self.patch_size

    def hidden(self, tower: str) -> int:
        """Width of the hidden layer of an MLP of the "vision" or "text" tower."""
        return int(getattr(self, f"{tower}_width") * getattr(self, f"{tower}_mlp_ratio") + 1e-6)

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "CLIPConfig":
        """A published size: "clip_vit_b16", or "ViT-B/16" as its authors write it.   overrides: fields of CLIPConfig."""
        known = list_clip_models()
        if name not in known:
            raise ValueError(
                f"unknown CLIP model {name!r}{close_to(str(name), known)}; the names are {', '.join(known)}"
            )
        return cls.from_dict({**_NAMES[_ALIASES.get(name, name)], **overrides})


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


_LARGE: dict[str, Any] = dict(
    embed_dim=768, patch_size=14, vision_width=1024, vision_depth=24, vision_num_heads=16, text_width=768,
    text_num_heads=12,
)  # fmt: skip
_NAMES: dict[str, dict[str, Any]] = {
    "clip_vit_b32": {},
    "clip_vit_b16": dict(patch_size=16),
    "clip_vit_l14": _LARGE,
    "clip_vit_l14_336": {**_LARGE, "image_size": 336},
}
_ALIASES = {
    "ViT-B/32": "clip_vit_b32",
    "ViT-B-32": "clip_vit_b32",
    "ViT-B/16": "clip_vit_b16",
    "ViT-B-16": "clip_vit_b16",
    "ViT-L/14": "clip_vit_l14",
    "ViT-L-14": "clip_vit_l14",
    "ViT-L/14@336px": "clip_vit_l14_336",
    "ViT-L-14-336": "clip_vit_l14_336",
}


def list_clip_models() -> list[str]:
    """Every name CLIPConfig.from_name takes, aliases too, sorted."""
    return sorted({*_NAMES, *_ALIASES})
