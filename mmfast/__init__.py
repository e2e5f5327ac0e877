"""mmfast: masked video transformers, fast. Many masked views of a clip in one packed batch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoints import LoadReport, load_pretrained
    from .config import MAEConfig, ViTConfig
    from .mae import MaskedAutoencoder
    from .masks import Pack, pack_masks, random_masks, running_cell_masks, sample_pack, tube_masks
    from .vit import MaskedViT

__version__ = "0.1.0"

_HOME = {
    "LoadReport": "checkpoints",
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

__all__ = [
    "LoadReport",
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
    raise AttributeError(f"module 'mmfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
