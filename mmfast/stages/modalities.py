"""What a modality fixes about a model."""

from typing import Any

from ..config import ViTConfig

_FIELDS: dict[str, dict[str, Any]] = {
    "rgb": {"in_chans": 3, "patch_size": 16, "img_size": 224},
    "flow": {"in_chans": 2, "patch_size": 16, "img_size": 224},
    "pose": {"in_chans": 21, "patch_size": 4, "img_size": 56},
}


def check_modality(modality: str) -> None:
    if modality not in _FIELDS:
        raise ValueError(f"modality must be one of {', '.join(_FIELDS)}, got {modality!r}")


def modality_fields(modality: str) -> dict[str, Any]:
    """Channels, patch and frame size of a modality, as fields of ViTConfig."""
    check_modality(modality)
    return dict(_FIELDS[modality])


def check_channels(modality: str, config: ViTConfig, what: str) -> None:
    """Raise ValueError where a model takes another modality's channels."""
    channels = modality_fields(modality)["in_chans"]
    if config.in_chans != channels:
        raise ValueError(f"{what} takes {config.in_chans} channels; {modality} has {channels}")
