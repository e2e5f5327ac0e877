"""Checkpoints of M2-CLIP: what trained, by the published names, on top of a CLIP of any dialect; both in one; mmfast's folders.

Where adapters stand, how wide they are, how many classes and words there are, the shapes of the file tell.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..clip_config import CLIPConfig
from ..m2clip_config import M2CLIPConfig
from .clip import convert_clip, open_clip_source
from .container import Source, StateDict
from .dialects import check_values
from .load import LoadReport
from .native import FORMAT, VERSION

if TYPE_CHECKING:
    from ..m2clip import M2CLIP

AnySource = str | os.PathLike[str] | StateDict | Source

_ADAPTER = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.adapter_pre_(attn|mlp)\.(textad_)?fc1\.weight")
# Published beginnings of names -> M2CLIP's; the first that fits.
_NAMES = (
    ("visual.t_adapter.", "t_adapter."),
    ("visual.adapter_fc.", "adapter_fc."),
    ("visual.transformer.", "clip.visual.transformer."),
    ("transformer.", "clip.text.transformer."),
    ("mlm_adapter.", "mlm_adapter."),
)
_HEADS = {"num_classes": "visual.adapter_fc.", "num_words": "mlm_adapter."}
_CLIP_FIELDS = {f.name for f in fields(CLIPConfig)}
# Fields of which files know nothing, so an override of them contradicts none.
_FREE = {"num_frames", "class_dropout", "class_scale", "cmc_double_softmax", "weights"}


@dataclass
class _Parts:
    """What a model is put together from: its config, tensors under its own names, and an account of the files."""

    config: M2CLIPConfig
    state: dict[str, Tensor]
    dropped: list[str]
    notes: list[str]
    dialect: str


def is_m2clip(source: Source) -> bool:
    """Whether a source is an M2CLIP of mmfast, or holds adapters by M2-CLIP's names."""
    about = source.config or {}
    if about.get("format") == FORMAT:
        return about.get("model") == "M2CLIP"
    return any(_ADAPTER.fullmatch(name) or name.startswith("mlm_adapter.") for name in source.tensors)


def load_pretrained_m2clip(
    source: AnySource,
    adapters: AnySource | None = None,
    *,
    preset: str = "paper",
    trust: bool = False,
    **overrides: Any,
) -> "tuple[M2CLIP, LoadReport]":
    """An M2CLIP and the report.   source, adapters, preset: as M2CLIP.from_pretrained takes them.

    overrides: fields of M2CLIPConfig and CLIPConfig, None as if not given. Another num_classes or num_words than the file's
    starts that head anew; any other that contradicts the files raises ValueError, as do adapters of another width.
    """
    from ..m2clip import M2CLIP  # m2clip.py wires from_pretrained to this module

    given = {name: value for name, value in overrides.items() if value is not None}
    base = open_clip_source(source, trust=trust)
    if (base.config or {}).get("format") == FORMAT and is_m2clip(base):
        if adapters is not None:
            raise ValueError(f"adapters must not be given with {base.where}, an M2CLIP that has its own")
        parts = _from_mmfast(base, given)
    else:
        extra = None if adapters is None else open_clip_source(adapters, trust=trust)
        parts = _from_published(base, extra, preset, given)
    check_values(parts.state, base.where)
    model = M2CLIP(parts.config)
    own = model.state_dict()
    initialised = [name for name in own if name not in parts.state]
    for name, tensor in parts.state.items():
        if name not in own or own[name].shape != tensor.shape:
            takes = f"takes {tuple(own[name].shape)}" if name in own else "has no place for it"
            raise ValueError(f"{base.where}: {name} has shape {tuple(tensor.shape)}, the model {takes}")
    model.load_state_dict(parts.state, strict=False)
    report = LoadReport(parts.dialect, list(parts.state), initialised, parts.dropped, parts.notes)
    return model, report


def adapter_state(model: "M2CLIP") -> dict[str, Tensor]:
    """What trains of a model, by M2-CLIP's names; copies on the CPU."""
    back = sorted(((own, published) for published, own in _NAMES), key=lambda pair: -len(pair[0]))
    state = {}
    for name, parameter in model.named_parameters():
        if "adapter" in name:
            own, published = next(pair for pair in back if name.startswith(pair[0]))
            state[published + name.removeprefix(own)] = parameter.detach().cpu().clone()
    return state


def save_adapters(model: "M2CLIP", path: str | os.PathLike[str]) -> None:
    """Write {"model": what trains by M2-CLIP's names}, whole or not at all."""
    target = Path(path)
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        torch.save({"model": adapter_state(model)}, aside)
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)


# -- inside ------------------------------------------------------------------------------------------------------------


def _from_mmfast(source: Source, given: dict[str, Any]) -> _Parts:
    about = source.config or {}
    if about.get("version") != VERSION or not isinstance(about.get("config"), dict):
        raise ValueError(f"{source.where}: config.json must have version {VERSION} and a config")
    known = M2CLIPConfig.from_dict(about["config"])
    state, dropped, notes = dict(source.tensors), list[str](), list(source.notes)
    changed = {name: value for name, value in given.items() if name not in _FREE and _differs(known, name, value)}
    for name in changed:
        if name not in _HEADS or not getattr(known, name) or not changed[name]:
            raise ValueError(f"{source.where}: {name} is fixed by the file, got {changed[name]!r}")
        dropped += _renew(state, {"num_classes": "adapter_fc.", "num_words": "mlm_adapter."}[name], notes, name)
    config = replace(known, **{n: v for n, v in given.items() if n in _FREE or n in changed})
    return _Parts(config, state, source.written_as(dropped), notes, "mmfast")


def _differs(known: M2CLIPConfig, name: str, value: Any) -> bool:
    holder: Any = known.clip if name in _CLIP_FIELDS else known
    if not hasattr(holder, name):
        raise ValueError(f"unknown config field {name!r}")
    have = getattr(holder, name)
    return bool((tuple(value) if isinstance(value, list) else value) != have)


def _renew(state: dict[str, Tensor], prefix: str, notes: list[str], name: str) -> list[str]:
    """Leave out a head; for words the part that has one row a word."""
    names = [n for n in state if n.startswith(prefix)]
    if name == "num_words":
        names = [n for n in names if n.startswith((f"{prefix}decoder.", f"{prefix}bias"))]
    for n in names:
        state.pop(n)
    notes.append(f"{name} is another than the file's: {prefix.rstrip('.')} starts anew")
    return names


def _from_published(base: Source, extra: Source | None, preset: str, given: dict[str, Any]) -> _Parts:
    trained = {name: tensor for name, tensor in base.tensors.items() if "adapter" in name}
    towers = _towers(base, trained)
    if towers is None:
        raise ValueError(
            f"{base.where}: holds M2-CLIP's adapters and no CLIP; give the CLIP file as source and this one as adapters"
        )
    dropped: list[str] = []
    notes: list[str] = []
    if extra is not None:
        if trained:
            raise ValueError(f"adapters must not be given with {base.where}, which holds adapters of its own")
        trained = {name: tensor for name, tensor in extra.tensors.items() if "adapter" in name}
        if not trained:
            raise ValueError(
                f"{extra.where}: holds no adapters; its tensors begin {', '.join(list(extra.tensors)[:4])}"
            )
        frozen = [name for name in extra.tensors if name not in trained]
        if frozen:
            notes.append(f"{len(frozen)} tensors of the CLIP beside the adapters are not taken: the CLIP file's are")
        dropped += extra.written_as(frozen)
        notes += extra.notes
    where = base.where if extra is None else extra.where
    clip = convert_clip(towers, **{n: v for n, v in given.items() if n in _CLIP_FIELDS})
    whole = extra is None and bool(trained)
    if whole:  # M2-CLIP's own state, whose last text block is the one for masked words
        clip.config = replace(clip.config, text_depth=clip.config.text_depth - 1)
    own = {n: v for n, v in given.items() if n not in _CLIP_FIELDS}
    found = _fields_of(trained, clip.config, where)
    for name, value in found.items():
        if name in own and name not in _HEADS and _plain(own[name]) != _plain(value):
            raise ValueError(f"{where}: {name} is {value!r} in the file, got {own[name]!r}")
        if name in _HEADS and own.get(name, value) != value:
            dropped += _renew(trained, _HEADS[name], notes, name)
    config = M2CLIPConfig.preset(preset, clip.config, **{**found, **own})
    state = {f"clip.{name}": tensor for name, tensor in clip.state.items()}
    if config.num_words and not whole:
        depth = config.clip.text_depth
        last, here = (f"text.transformer.resblocks.{n}." for n in (depth - 1, depth))
        copied = {n.removeprefix(last): t for n, t in clip.state.items() if n.startswith(last)}
        state |= {f"clip.{here}{name}": tensor for name, tensor in copied.items()}
        notes.append(f"text block {depth}, for masked words, is a copy of the last of CLIP's")
    for name, tensor in trained.items():
        published, mine = next((pair for pair in _NAMES if name.startswith(pair[0])), ("", ""))
        state[mine + name.removeprefix(published)] = tensor
    dialect = "m2clip" if trained else clip.dialect
    return _Parts(config, state, clip.dropped + dropped, clip.notes + notes, dialect)


def _towers(base: Source, trained: Mapping[str, Tensor]) -> Source | None:
    """The CLIP of a source without adapters; None if there is none."""
    rest = {name: tensor for name, tensor in base.tensors.items() if name not in trained}
    if trained and "visual.conv1.weight" not in rest:
        return None
    original = {name: base.original[name] for name in rest if name in base.original}
    return Source(base.where, rest, base.config, original, base.notes)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, str) else value


def _fields_of(trained: Mapping[str, Tensor], clip: CLIPConfig, where: str) -> dict[str, Any]:
    """The fields of M2CLIPConfig that the shapes of adapters tell."""
    if not trained:
        return {}
    unknown = [name for name in trained if not name.startswith(tuple(published for published, _ in _NAMES))]
    if unknown:
        raise ValueError(f"{where}: holds {unknown[0]}, which M2CLIP has no place for")
    found: dict[str, Any] = {}
    for field, name in (("num_classes", "visual.adapter_fc.weight"), ("num_words", "mlm_adapter.decoder.weight")):
        if name in trained:
            found[field] = trained[name].shape[0]
    blocks = clip.text_depth + ("num_words" in found)
    for tower, depth, width in (("vision", clip.vision_depth, clip.vision_width), ("text", blocks, clip.text_width)):
        found |= _placement(trained, tower, depth, width, where)
    return found


def _placement(trained: Mapping[str, Tensor], tower: str, depth: int, width: int, where: str) -> dict[str, Any]:
    halves: dict[int, set[str]] = {}
    hidden: set[int] = set()
    for name, tensor in trained.items():
        match = _ADAPTER.fullmatch(name)
        if match is None or bool(match[1]) != (tower == "vision"):
            continue
        if tensor.ndim != 2 or tensor.shape[1] != width:
            raise ValueError(
                f"{where}: {name} has shape {tuple(tensor.shape)}: adapters of another width, the CLIP's {tower} tower is {width}"
            )
        halves.setdefault(int(match[2]), set()).add(match[3])
        hidden.add(tensor.shape[0])
    if not halves:
        return {f"{tower}_layers": 0}
    count = depth - min(halves)
    alike = len(hidden) == 1 and len({frozenset(h) for h in halves.values()}) == 1
    if not alike or sorted(halves) != list(range(depth - count, depth)):
        raise ValueError(
            f"{where}: {tower} adapters must stand alike in the last of {depth} blocks, got {sorted(halves)}"
        )
    before = tuple(sorted(halves[min(halves)]))
    return {f"{tower}_layers": count, f"{tower}_before": before, f"{tower}_hidden": hidden.pop()}
