"""Builds a model from a checkpoint and says what went where."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from ..config import MAEConfig, ViTConfig
from .container import StateDict
from .dialects import Converted, convert

if TYPE_CHECKING:
    from ..clip import CLIP
    from ..evl import EVL
    from ..m2clip import M2CLIP
    from ..mae import MaskedAutoencoder
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
    """Build a model with MaskedViT's layout, or another by `model`, from a checkpoint's config and give it the weights.

    options: as `convert`, which also says what is raised. What the checkpoint lacks keeps the values of `build`.
    """
    return _built(build, convert(source, **options))


def load_pretrained_vit(source: str | os.PathLike[str] | StateDict, **options: Any) -> "tuple[MaskedViT, LoadReport]":
    """A MaskedViT from a checkpoint of any dialect, and the report. Takes and raises what `convert` does."""
    from ..vit import MaskedViT  # vit.py wires from_pretrained to this module

    return load_into(MaskedViT, source, **options)


def load_pretrained_mae(
    source: str | os.PathLike[str] | StateDict, **options: Any
) -> "tuple[MaskedAutoencoder, LoadReport]":
    """A MaskedAutoencoder from a checkpoint of any dialect, and the report. Takes and raises what `convert` does.

    A file without a decoder gives the encoder; the decoder starts anew, of the size published with such an encoder.
    """
    from ..mae import MaskedAutoencoder

    build: Callable[[Any], MaskedAutoencoder] = MaskedAutoencoder
    return load_into(build, source, model="MaskedAutoencoder", **options)


def load_pretrained(
    source: str | os.PathLike[str] | StateDict, *, trust: bool = False, **options: Any
) -> "MaskedViT | MaskedAutoencoder | CLIP | M2CLIP | EVL":
    """The model a checkpoint of any dialect holds, in eval mode, with its `load_report`. Takes what `convert` does.

    A pre-training file, which has a decoder, is a MaskedAutoencoder; one with both towers of CLIP a CLIP, which takes
    fields of CLIPConfig, or with M2-CLIP's adapters too an M2CLIP, which takes its own as well; one with EVL's decoder an
    EVL, which takes what EVL.from_pretrained does, of a decoder alone its backbone too; any other a MaskedViT.
    """
    from .clip import is_clip, load_pretrained_clip, open_clip_source  # which imports LoadReport from here
    from .evl import is_evl, load_pretrained_evl
    from .m2clip import is_m2clip, load_pretrained_m2clip

    loaded = open_clip_source(source, trust=trust)
    if is_evl(loaded):
        evl, report = load_pretrained_evl(loaded, **options)
        evl.load_report = report
        return evl.eval()
    if is_m2clip(loaded):
        m2clip, report = load_pretrained_m2clip(loaded, **options)
        m2clip.load_report = report
        return m2clip.eval()
    if is_clip(loaded):
        clip, report = load_pretrained_clip(loaded, **options)
        clip.load_report = report
        return clip.eval()
    converted = convert(loaded, model=None, **options)
    model, report = _built(_class_of(converted.config), converted)
    model.load_report = report
    return model.eval()


def _class_of(config: ViTConfig) -> Any:
    if isinstance(config, MAEConfig):
        from ..mae import MaskedAutoencoder

        return MaskedAutoencoder
    from ..vit import MaskedViT

    return MaskedViT


def _built(build: Callable[[ViTConfig], Model], converted: Converted) -> tuple[Model, LoadReport]:
    model = build(converted.config)
    missing, unexpected = model.load_state_dict(converted.state, strict=False)
    if unexpected or set(missing) != set(converted.initialised):
        wrong = sorted({*unexpected, *(set(missing) ^ set(converted.initialised))})
        kind = "MaskedAutoencoder" if isinstance(converted.config, MAEConfig) else "MaskedViT"
        raise ValueError(f"{type(model).__name__} has not the layout of {kind}; it differs in {', '.join(wrong[:5])}")
    report = LoadReport(
        converted.dialect, list(converted.state), converted.initialised, converted.dropped, converted.notes
    )
    return model, report
