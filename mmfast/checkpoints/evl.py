"""Checkpoints of EVL: decoder and head by the published names, on top of a backbone of any dialect; mmfast's folders of both.

Which temporal modules there are, how many layers, classes, frames and cells, the shapes of the file tell.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..clip_config import CLIPConfig
from ..config import ViTConfig
from ..evl_config import EVLConfig
from .clip import convert_clip, is_clip, open_clip_source
from .container import Source, StateDict
from .dialects import check_values, convert
from .load import LoadReport
from .native import FORMAT, VERSION

if TYPE_CHECKING:
    from ..evl import EVL

AnySource = str | os.PathLike[str] | StateDict | Source

_LAYER = re.compile(r"decoder\.decoder_layers\.(\d+)\.")
_MODULES = {
    "temporal_conv": "decoder.temporal_conv.",
    "temporal_positions": "decoder.temporal_pos_embed.",
    "temporal_cross_attention": "decoder.cross_attention.",
}
# Fields of which files know nothing, so an override of them contradicts none; and those that `interpolate` changes.
_FREE = {"mlp_dropout", "class_dropout", "zero_query"}
_RESIZED = {"num_frames", "grid"}


def is_evl(source: Source) -> bool:
    """Whether a source is an EVL of mmfast, or holds a decoder by EVL's names."""
    about = source.config or {}
    if about.get("format") == FORMAT:
        return about.get("model") == "EVL"
    return "decoder.cls_token" in source.tensors and "decoder.decoder_layers.0.norm3.weight" in source.tensors


def load_pretrained_evl(
    source: AnySource | None,
    backbone: Any = None,
    *,
    num_heads: int | None = None,
    backbone_dtype: torch.dtype | None = None,
    interpolate: bool = False,
    preset: str = "paper",
    trust: bool = False,
    **overrides: Any,
) -> "tuple[EVL, LoadReport]":
    """An EVL and the report. Takes what EVL.from_pretrained does.

    Another num_classes than the file's starts the head anew; num_frames and grid resize with `interpolate`; any other
    override that contradicts the file raises ValueError, as does a decoder of another width than the backbone.
    """
    from ..evl import EVL  # evl.py wires from_pretrained to this module

    given = {name: value for name, value in overrides.items() if value is not None}
    loaded = None if source is None else open_clip_source(source, trust=trust)
    if loaded is not None and (loaded.config or {}).get("format") == FORMAT and is_evl(loaded):
        if backbone is not None or num_heads is not None:
            raise ValueError(f"backbone and num_heads must not be given with {loaded.where}, an EVL that has its own")
        config, state, notes = *_of_mmfast(loaded), list(loaded.notes)
        model, dialect, dropped = None, "mmfast", list[str]()
    else:
        own_config, model, base = _backbone(backbone, num_heads, trust, loaded)
        state, notes, dropped, dialect = _decoder_state(loaded), list(base.notes), list(base.dropped), base.dialect
        if loaded is None:
            config = EVLConfig.preset(preset, own_config, **given)
        else:
            one = EVLConfig.preset(preset, own_config, num_layers=1)
            config, dialect = _read_config(state, one, loaded.where), "evl"
            notes += loaded.notes
    where = "the backbone" if loaded is None else loaded.where
    resized: dict[str, Any] = {}
    renewed: list[str] = []
    if loaded is not None:
        renewed = _renew_head(state, config, given, notes)
        dropped += loaded.written_as(renewed)
        config, resized = _overridden(config, given, where)
    check_values(state, where)
    made = EVL(config, model)
    own = made.state_dict()
    for name, tensor in state.items():
        if name not in own or own[name].shape != tensor.shape:
            takes = f"takes {tuple(own[name].shape)}" if name in own else "has no place for it"
            raise ValueError(f"{where}: {name} has shape {tuple(tensor.shape)}, the model {takes}")
    there = [name for name in own if model is not None and name.startswith("backbone.")]
    initialised = [name for name in own if name not in state and name not in there]
    lacking = [name for name in initialised if loaded is not None and name not in renewed]
    if lacking:
        raise ValueError(f"{where}: lacks {', '.join(lacking[:3])}, {len(lacking)} tensors in all")
    made.load_state_dict(state, strict=False)
    _fit(made, resized, interpolate, notes)
    if backbone_dtype is not None:
        made.backbone.to(backbone_dtype)
    return made, LoadReport(dialect, there + list(state), initialised, dropped, notes)


def decoder_state(model: "EVL") -> dict[str, Tensor]:
    """Decoder and head of a model, by EVL's names; copies on the CPU."""
    return {n: t.detach().cpu().clone() for n, t in model.state_dict().items() if not n.startswith("backbone.")}


def save_decoder(model: "EVL", path: str | os.PathLike[str]) -> None:
    """Write {"model": decoder and head by EVL's names, as its training leaves them}, whole or not at all."""
    target = Path(path)
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        torch.save({"model": {f"module.{name}": tensor for name, tensor in decoder_state(model).items()}}, aside)
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)


# -- inside ------------------------------------------------------------------------------------------------------------


def _of_mmfast(source: Source) -> tuple[EVLConfig, dict[str, Tensor]]:
    about = source.config or {}
    if about.get("version") != VERSION or not isinstance(about.get("config"), dict):
        raise ValueError(f"{source.where}: config.json must have version {VERSION} and a config")
    return EVLConfig.from_dict(about["config"]), dict(source.tensors)


def _backbone(
    backbone: Any, num_heads: int | None, trust: bool, decoder: Source | None
) -> tuple[CLIPConfig | ViTConfig, Any, LoadReport]:
    """The backbone's config, the backbone, and an account of its file."""
    from ..clip import CLIP
    from ..clip_vision import CLIPVision
    from ..vit import MaskedViT

    if backbone is None:
        holder = "source" if decoder is None else decoder.where
        raise ValueError(f"backbone must be given: a CLIP or a MaskedViT; {holder} holds none")
    if isinstance(backbone, (CLIP, CLIPVision, MaskedViT)):
        if num_heads is not None:
            raise ValueError("num_heads must not be given with a backbone that is a module")
        tower = backbone.visual if isinstance(backbone, CLIP) else backbone
        return tower.config, tower, LoadReport("module")
    loaded = open_clip_source(backbone, trust=trust)
    if is_clip(loaded):
        clip = convert_clip(loaded, vision_num_heads=num_heads)
        vision = CLIPVision(clip.config)
        state = {n.removeprefix("visual."): t for n, t in clip.state.items() if n.startswith("visual.")}
        vision.load_state_dict(state)
        notes = [*clip.notes, "of the CLIP, only the vision tower is taken"]
        return clip.config, vision, LoadReport(clip.dialect, notes=notes)
    options: dict[str, Any] = {} if num_heads is None else {"num_heads": num_heads}
    converted = convert(loaded, num_classes=0, **options)
    vit = MaskedViT(converted.config)
    vit.load_state_dict(converted.state, strict=False)
    report = LoadReport(converted.dialect, dropped=converted.dropped, notes=converted.notes)
    return converted.config, vit, report


def _decoder_state(source: Source | None) -> dict[str, Tensor]:
    if source is None:
        return {}
    if not is_evl(source):
        raise ValueError(
            f"{source.where}: holds no decoder of EVL; its tensors begin {', '.join(list(source.tensors)[:4])}"
        )
    foreign = [name for name in source.tensors if not name.startswith(("decoder.", "proj."))]
    if foreign:
        raise ValueError(
            f"{source.where}: holds {foreign[0]} beside decoder and head; a backbone that was trained with them is not taken"
        )
    return {name: tensor.clone() for name, tensor in source.tensors.items()}


def _read_config(state: Mapping[str, Tensor], config: EVLConfig, where: str) -> EVLConfig:
    """The config with what the shapes of a decoder tell."""

    def shape(name: str, dims: int) -> torch.Size:
        tensor = state.get(name)
        if tensor is None or tensor.ndim != dims:
            got = "nothing" if tensor is None else tuple(tensor.shape)
            raise ValueError(f"{where}: {name} must have {dims} dimensions, got {got}")
        return tensor.shape

    width = shape("decoder.cls_token", 1)[0]
    if width != config.width:
        raise ValueError(f"{where}: is a decoder of width {width}, the backbone's is {config.width}")
    layers = 1 + max(int(match[1]) for match in map(_LAYER.match, state) if match)
    if layers > config.depth:
        raise ValueError(f"{where}: reads the last {layers} blocks, the backbone has {config.depth}")
    found: dict[str, Any] = {name: any(n.startswith(p) for n in state) for name, p in _MODULES.items()}
    found["num_layers"] = layers
    found["num_classes"] = shape("proj.2.weight", 2)[0]
    found["decoder_dim"] = shape("decoder.decoder_layers.0.attn.q_proj.weight", 2)[0]
    found["decoder_mlp_ratio"] = shape("decoder.decoder_layers.0.mlp.fc1.weight", 2)[0] / width
    if found["decoder_dim"] != config.decoder_dim:
        found["decoder_num_heads"] = None  # the usual of that width
    if found["temporal_positions"]:
        found["num_frames"] = shape("decoder.temporal_pos_embed.0", 2)[0]
    if found["temporal_cross_attention"]:
        found["grid"] = _table_grid(shape("decoder.cross_attention.0.w1", 2)[0], config.grid, where)
    return replace(config, **found)


def _table_grid(rows: int, own: tuple[int, int], where: str) -> tuple[int, int]:
    """The grid (h, w) whose tables of offsets have so many rows: the backbone's, else a square one."""
    if rows == (2 * own[0] - 1) * (2 * own[1] - 1):
        return own
    side = round(rows**0.5)
    if side * side != rows or side % 2 == 0:
        raise ValueError(
            f"{where}: tables of {rows} offsets are neither of the backbone's grid {own[0]} x {own[1]} nor of a square one"
        )
    return (side + 1) // 2, (side + 1) // 2


def _renew_head(state: dict[str, Tensor], config: EVLConfig, given: dict[str, Any], notes: list[str]) -> list[str]:
    """Leave out a head of another number of classes than asked for."""
    if given.get("num_classes", config.num_classes) == config.num_classes:
        return []
    names = [name for name in state if name.startswith("proj.2.")]
    for name in names:
        state.pop(name)
    notes.append("num_classes is another than the file's: proj.2 starts anew")
    return names


def _overridden(config: EVLConfig, given: dict[str, Any], where: str) -> tuple[EVLConfig, dict[str, Any]]:
    """The config to load the file into, and what is to be resized afterwards."""
    EVLConfig._check_names(given)
    taken = {n: v for n, v in given.items() if n in _FREE | {"num_classes", "decoder_num_heads", "norm_eps"}}
    resized = {n: tuple(v) if n == "grid" else v for n, v in given.items() if n in _RESIZED}
    for name, value in given.items():
        if name not in taken and name not in resized and value != getattr(config, name):
            raise ValueError(f"{where}: {name} is {getattr(config, name)!r} in the file, got {value!r}")
    return replace(config, **taken), resized


def _fit(model: "EVL", resized: dict[str, Any], interpolate: bool, notes: list[str]) -> None:
    """Resize positions and tables to what was asked for and, with interpolate, to the backbone's grid."""
    config, backbone = model.config, model.config.backbone
    own = EVLConfig(backbone, num_layers=1).grid
    wanted: dict[str, Any] = {"num_frames": config.num_frames, "grid": own if interpolate else config.grid} | resized
    if isinstance(backbone, ViTConfig) and interpolate:
        wanted["num_frames"] = resized.get("num_frames", backbone.grid[0])
    if not interpolate and config.temporal_cross_attention and config.grid != own and "grid" not in resized:
        raise ValueError(
            f"the tables of offsets are of a {config.grid[0]} x {config.grid[1]} grid, the backbone's is {own[0]} x {own[1]}; "
            "interpolate=True resizes them"
        )
    uses = {"num_frames": config.temporal_positions, "grid": config.temporal_cross_attention}
    changed = [name for name, value in wanted.items() if value != getattr(config, name)]
    for name in changed:
        if uses[name] and not interpolate:
            raise ValueError(
                f"{name} is {getattr(config, name)!r} in the file, got {wanted[name]!r}; interpolate=True resizes"
            )
        if uses[name]:
            notes.append(f"{name} resized from {getattr(config, name)!r} to {wanted[name]!r}")
    if changed:
        model.resize(**wanted)
