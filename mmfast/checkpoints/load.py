"""Builds a model from a checkpoint and says what went where."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from ..config import ViTConfig
from .container import StateDict
from .dialects import convert

if TYPE_CHECKING:
    from ..vit import MaskedViT

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class LoadReport:
    """What became of a checkpoint: `loaded` and `initialised` are the model's names, `dropped` are the file's."""

    dialect: str
    loaded: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.dialect}: {len(self.loaded)} tensors loaded"]
        for title, names in (
            ("initialised (not in the file)", self.initialised),
            ("dropped from the file", self.dropped),
        ):
            if names:
                more = f", and {len(names) - 6} more" if len(names) > 6 else ""
                lines.append(f"  {title}, {len(names)}: {', '.join(names[:6])}{more}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def load_into(
    build: Callable[[ViTConfig], Model], source: str | os.PathLike[str] | StateDict, **options: Any
) -> tuple[Model, LoadReport]:
    """Build a model with MaskedViT's layout from a checkpoint's config and give it the weights.

    options: as `convert`, which also says what is raised. What the checkpoint lacks keeps the values of `build`.
    """
    converted = convert(source, **options)
    model = build(converted.config)
    missing, unexpected = model.load_state_dict(converted.state, strict=False)
    if unexpected or set(missing) != set(converted.initialised):
        wrong = sorted({*unexpected, *(set(missing) ^ set(converted.initialised))})
        raise ValueError(
            f"{type(model).__name__} has not the layout of MaskedViT; it differs in {', '.join(wrong[:5])}"
        )
    report = LoadReport(
        converted.dialect, list(converted.state), converted.initialised, converted.dropped, converted.notes
    )
    return model, report


def load_pretrained_vit(source: str | os.PathLike[str] | StateDict, **options: Any) -> "tuple[MaskedViT, LoadReport]":
    """A MaskedViT from a checkpoint of any dialect, and the report. Takes and raises what `convert` does."""
    from ..vit import MaskedViT  # vit.py wires from_pretrained to this module

    return load_into(MaskedViT, source, **options)


def load_pretrained(source: str | os.PathLike[str] | StateDict, **options: Any) -> "MaskedViT":
    """The model a checkpoint of any dialect holds, in eval mode, with its `load_report`. Takes what `convert` does."""
    model, report = load_pretrained_vit(source, **options)
    model.load_report = report
    return model.eval()
