"""mmfast: masked video transformers, fast. Many masked views of a clip in one packed batch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoints import LoadReport, load_pretrained
    from .clip import CLIP
    from .clip_config import CLIPConfig
    from .config import MAEConfig, ViTConfig
    from .evl import EVL
    from .evl_config import EVLConfig
    from .m2clip import M2CLIP
    from .m2clip_config import M2CLIPConfig
    from .mae import MaskedAutoencoder
    from .masks import Pack, pack_masks, random_masks, running_cell_masks, sample_pack, tube_masks
    from .vit import MaskedViT

__version__ = "0.1.0"

_HOME = {
    "CLIP": "clip",
    "CLIPConfig": "clip_config",
    "EVL": "evl",
    "EVLConfig": "evl_config",
    "LoadReport": "checkpoints",
    "M2CLIP": "m2clip",
    "M2CLIPConfig": "m2clip_config",
    "MAEConfig": "config",
    "MaskedAutoencoder": "mae",
    "MaskedViT": "vit",
    "Pack": "masks",
    "ViTConfig": "config",
    "load_pretrained": "checkpoints",
    "pack_masks": "masks",
    "random_masks": "masks",
    "running_cell_masks": "masks",
    "sample_pack": "masks",
    "tube_masks": "masks",
}
_MODULES = ("adapters", "fewshot")

__all__ = [
    "CLIP",
    "EVL",
    "M2CLIP",
    "CLIPConfig",
    "EVLConfig",
    "LoadReport",
    "M2CLIPConfig",
    "MAEConfig",
    "MaskedAutoencoder",
    "MaskedViT",
    "Pack",
    "ViTConfig",
    "load_pretrained",
    "pack_masks",
    "random_masks",
    "running_cell_masks",
    "sample_pack",
    "tube_masks",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: `import mmfast` alone costs nothing beyond torch."""
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module 'mmfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
