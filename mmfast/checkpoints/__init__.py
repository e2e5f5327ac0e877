"""Checkpoints of every known dialect, read safely and turned into the layout of MaskedViT or MaskedAutoencoder."""

from .container import read
from .dialects import DIALECTS, Converted, convert
from .export import export_config, export_mae_state, export_preprocessor, export_state
from .layout import canonical_shapes
from .load import LoadReport, load_into, load_pretrained, load_pretrained_mae, load_pretrained_vit
from .save import save_pretrained

__all__ = [
    "DIALECTS",
    "Converted",
    "LoadReport",
    "canonical_shapes",
    "convert",
    "export_config",
    "export_mae_state",
    "export_preprocessor",
    "export_state",
    "load_into",
    "load_pretrained",
    "load_pretrained_mae",
    "load_pretrained_vit",
    "read",
    "save_pretrained",
]
