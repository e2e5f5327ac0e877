"""Checkpoints of CLIP: OpenAI's (TorchScript or plain), open_clip's, Hugging Face's and mmfast's own.

OpenAI's names become mmfast's by a prefix for the text tower and the names inside a block. open_clip has them too, sometimes
with `text.` already; its folders hold open_clip_config.json. Hugging Face splits queries, keys and values, packed here.
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..clip_config import CLIPConfig
from ..config import usual_num_heads
from .container import Source, StateDict, pixel_fields, read
from .dialects import check_values
from .load import LoadReport
from .native import FORMAT, VERSION
from .torchscript import is_torchscript, read_torchscript

if TYPE_CHECKING:
    from ..clip import CLIP

_OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_OPENAI_BLOCK = {
    "ln_1.": "norm1.",
    "ln_2.": "norm2.",
    "attn.in_proj_": "attn.qkv.",
    "attn.out_proj.": "attn.proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
_HF_BLOCK = {"layer_norm1.": "norm1.", "layer_norm2.": "norm2.", "self_attn.out_proj.": "attn.proj."}
_HF_NAMES = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "visual_projection.weight": "visual.proj",
    "text_model.embeddings.token_embedding.weight": "text.token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "text.positional_embedding",
    "text_model.final_layer_norm.weight": "text.ln_final.weight",
    "text_model.final_layer_norm.bias": "text.ln_final.bias",
    "text_projection.weight": "text.text_projection",
    "logit_scale": "logit_scale",
}
_HF_LAYER = re.compile(r"(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)")
_HF_QKV = re.compile(r"self_attn\.([qkv])_proj\.(weight|bias)")
_BLOCK = re.compile(r"(visual\.|text\.)transformer\.resblocks\.(\d+)\.(.+)")
# Not weights: what OpenAI's archives tell of themselves, and tables that a model makes again.
_OF_NO_MODEL = re.compile(r"input_resolution|context_length|vocab_size|(text\.)?attn_mask|.*position_ids")
_HF_GELU = {"quick_gelu": "quick", "gelu": "erf", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
# What transformers leaves out of config.json where it is the default.
_HF_HEADS = {"vision": 12, "text": 8}


@dataclass
class ConvertedCLIP:
    """A checkpoint as CLIP(config) takes it; `state` shares no memory with the file or the state dict it came from."""

    config: CLIPConfig
    state: dict[str, Tensor]
    dropped: list[str]  # in the file, by its own names, not in the model
    notes: list[str]
    dialect: str


@dataclass
class _Draft:
    names: dict[str, str]  # name in the source -> mmfast's
    fields: dict[str, Any] = field(default_factory=dict)
    packed: dict[str, dict[str, str]] = field(default_factory=dict)  # mmfast's -> q | k | v -> name in the source
    transposed: set[str] = field(default_factory=set)  # mmfast's names
    notes: list[str] = field(default_factory=list)


def load_pretrained_clip(
    source: str | os.PathLike[str] | StateDict | Source, **options: Any
) -> "tuple[CLIP, LoadReport]":
    """A CLIP from a checkpoint of any dialect, and the report. Takes and raises what `convert_clip` does."""
    from ..clip import CLIP  # clip.py wires from_pretrained to this module

    converted = convert_clip(source, **options)
    model = CLIP(converted.config)
    model.load_state_dict(converted.state)
    return model, LoadReport(converted.dialect, list(converted.state), [], converted.dropped, converted.notes)


def open_clip_source(source: str | os.PathLike[str] | StateDict | Source, *, trust: bool = False) -> Source:
    """As `read`, and TorchScript archives and open_clip's folders too."""
    if isinstance(source, Source):
        return source
    if not isinstance(source, (str, os.PathLike)):
        return read(source, trust=trust)
    path = Path(source)
    if is_torchscript(path):
        found = read(read_torchscript(path))
        found.where = str(path)
        return found
    about = path / "open_clip_config.json"
    if not about.is_file():
        return read(path, trust=trust)
    file = next((path / name for name in _OPEN_CLIP_FILES if (path / name).is_file()), None)
    if file is None:
        raise ValueError(f"{path}: has open_clip_config.json, but none of {', '.join(_OPEN_CLIP_FILES)}")
    found = read(file, trust=trust)
    try:
        found.config = json.loads(about.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{about}: is not JSON ({error})") from error
    return found


def is_clip(source: Source) -> bool:
    """Whether a source holds both towers of a CLIP, of any dialect."""
    return any(why_not(source) is None for why_not in _WHY_NOT.values())


def convert_clip(
    source: str | os.PathLike[str] | StateDict | Source, *, trust: bool = False, **overrides: Any
) -> ConvertedCLIP:
    """Read a CLIP checkpoint of any dialect; which one, the names of its tensors tell.

    trust: run the code a pickle asks for.   overrides: fields of CLIPConfig, None as if not given. One that contradicts the
    file's shapes is refused.

    Raises ValueError for a file that cannot be read, is no CLIP of vision transformers, lacks a tensor, holds one that would
    change what the model computes, or holds NaN or infinity.
    """
    loaded = open_clip_source(source, trust=trust)
    reasons = {dialect: why_not(loaded) for dialect, why_not in _WHY_NOT.items()}
    dialect = next((d for d, reason in reasons.items() if reason is None), None)
    if dialect is None:
        listed = "".join(f"\n  {d}: {reason}" for d, reason in reasons.items())
        raise ValueError(f"{loaded.where}: is no CLIP of vision transformers{listed}")
    draft = _CONVERT[dialect](loaded)
    dropped = [name for name in loaded.tensors if _OF_NO_MODEL.fullmatch(name)]
    state = _gather(loaded, draft)
    asked = {name: value for name, value in overrides.items() if value is not None}
    config = _read_config(state, draft, asked, loaded.where)
    _check_layout(state, config, loaded.where, draft)
    check_values(state, loaded.where)
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in state.values()} - {"float32"})
    if dtypes:
        draft.notes.append(f"stored as {' and '.join(dtypes)}")
    state = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    return ConvertedCLIP(config, state, loaded.written_as(dropped), loaded.notes + draft.notes, dialect)


# -- dialects ----------------------------------------------------------------------------------------------------------


def _no_mmfast(source: Source) -> str | None:
    about = source.config or {}
    if about.get("format") != FORMAT:
        return f'no config.json with "format": "{FORMAT}"'
    return None if about.get("model") == "CLIP" else f"config.json is of a {about.get('model')}"


def _from_mmfast(source: Source) -> _Draft:
    assert source.config is not None
    if source.config.get("version") != VERSION or not isinstance(source.config.get("config"), dict):
        raise ValueError(f"{source.where}: config.json must have version {VERSION} and a config")
    return _Draft({name: name for name in source.tensors}, dict(source.config["config"]))


def _no_hf(source: Source) -> str | None:
    for name in ("vision_model.embeddings.patch_embedding.weight", "text_model.embeddings.token_embedding.weight"):
        if name not in source.tensors:
            return f"no {name}"
    kind = (source.config or {}).get("model_type", "clip")
    return None if kind == "clip" else f"config.json is of a {kind!r} model"


def _from_hf(source: Source) -> _Draft:
    draft = _Draft({})
    for name in source.tensors:
        if _OF_NO_MODEL.fullmatch(name):
            continue
        layer = _HF_LAYER.fullmatch(name)
        if layer is None:
            draft.names[name] = _HF_NAMES.get(name, name)
            continue
        tower, n, rest = layer.groups()
        block = f"{'visual' if tower == 'vision' else 'text'}.transformer.resblocks.{n}."
        if match := _HF_QKV.fullmatch(rest):
            draft.packed.setdefault(f"{block}attn.qkv.{match[2]}", {})[match[1]] = name
        else:
            draft.names[name] = block + _renamed(rest, _HF_BLOCK)
    draft.transposed = {"visual.proj", "text.text_projection"}
    draft.fields = _hf_fields(source)
    if source.config is None:
        draft.notes.append('no config.json: gelu "quick" and norm_eps 1e-5, as transformers has them by default')
    return draft


def _hf_fields(source: Source) -> dict[str, Any]:
    if source.config is None:
        return {}
    fields: dict[str, Any] = {}
    kinds = []
    for tower, heads in _HF_HEADS.items():
        own = source.config.get(f"{tower}_config") or {}
        fields[f"{tower}_num_heads"] = own.get("num_attention_heads", heads)
        kinds.append((own.get("hidden_act", "quick_gelu"), own.get("layer_norm_eps", 1e-5)))
    if kinds[0] != kinds[1]:
        raise ValueError(f"{source.where}: both towers must have one hidden_act and layer_norm_eps, got {kinds}")
    activation, eps = kinds[0]
    if activation not in _HF_GELU:
        raise ValueError(f"{source.where}: hidden_act must be one of {', '.join(_HF_GELU)}, got {activation!r}")
    return {**fields, "gelu": _HF_GELU[activation], "norm_eps": eps, **pixel_fields(source.config)}


def _no_openai(source: Source) -> str | None:
    names = source.tensors
    if "visual.layer1.0.conv1.weight" in names:
        return "its vision tower is a ResNet"
    for name in ("visual.conv1.weight", "visual.class_embedding", "token_embedding.weight"):
        if name not in names and f"text.{name}" not in names:
            return f"no {name}"
    return None


def _from_openai(source: Source) -> _Draft:
    draft = _Draft({})
    for name in source.tensors:
        if _OF_NO_MODEL.fullmatch(name):
            continue
        full = name if name.startswith(("visual.", "text.")) or name == "logit_scale" else f"text.{name}"
        if block := _BLOCK.fullmatch(full):
            full = f"{block[1]}transformer.resblocks.{block[2]}.{_renamed(block[3], _OPENAI_BLOCK)}"
        draft.names[name] = full
    about = (source.config or {}).get("model_cfg")
    if isinstance(about, dict):
        draft.fields |= _open_clip_fields(about, (source.config or {}).get("preprocess_cfg") or {}, source.where)
    else:
        draft.notes.append(
            'gelu "quick" assumed, as OpenAI\'s and open_clip\'s "quickgelu" models have it; else give gelu="erf"'
        )
    return draft


def _open_clip_fields(model: dict[str, Any], pixels: dict[str, Any], where: str) -> dict[str, Any]:
    vision, text = model.get("vision_cfg") or {}, model.get("text_cfg") or {}
    for tower, own in (("vision_cfg", vision), ("text_cfg", text)):
        foreign = [key for key in ("timm_model_name", "hf_model_name") if own.get(key)]
        if foreign:
            raise ValueError(f"{where}: {tower} is a {own[foreign[0]]!r}, no transformer of CLIP")
    fields = {"gelu": "quick" if model.get("quick_gelu") else "erf"}
    fields |= {"text_num_heads": text["heads"]} if "heads" in text else {}
    width = vision.get("width", 768)
    fields |= {"vision_num_heads": width // vision["head_width"]} if "head_width" in vision else {}
    return fields | {key: tuple(pixels[key]) for key in ("mean", "std") if key in pixels}


_WHY_NOT: dict[str, Callable[[Source], str | None]] = {
    "mmfast": _no_mmfast,
    "hf_clip": _no_hf,
    "openai_clip": _no_openai,
}
_CONVERT = {"mmfast": _from_mmfast, "hf_clip": _from_hf, "openai_clip": _from_openai}


def _renamed(rest: str, names: dict[str, str]) -> str:
    old = next((old for old in names if rest.startswith(old)), "")
    return names.get(old, "") + rest.removeprefix(old)


# -- tensors -----------------------------------------------------------------------------------------------------------


def _gather(source: Source, draft: _Draft) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, own in draft.names.items():
        if own in state:
            raise ValueError(f"{source.where}: two tensors are both {own}, one of them {source.written_as([name])[0]}")
        tensor = source.tensors[name]
        if own == "text.text_projection.weight":  # a linear layer in some of open_clip's models
            own, tensor = "text.text_projection", tensor.t()
        state[own] = tensor.t() if own in draft.transposed and tensor.ndim == 2 else tensor
    for own, parts in draft.packed.items():
        tensors = [source.tensors[parts[which]] for which in "qkv" if which in parts]
        if len(tensors) < 3 or len({tuple(t.shape) for t in tensors}) > 1:
            shapes = {name: tuple(source.tensors[name].shape) for name in parts.values()}
            raise ValueError(f"{source.where}: query, key and value must be there and alike, got {shapes}")
        state[own] = torch.cat(tensors)
    if "logit_scale" in state:
        state["logit_scale"] = state["logit_scale"].reshape(())
    return state


def _read_config(state: dict[str, Tensor], draft: _Draft, asked: dict[str, Any], where: str) -> CLIPConfig:
    fields = _fields_of_shapes(state, where) | draft.fields | asked
    for tower in ("vision", "text"):
        name, width = f"{tower}_num_heads", fields[f"{tower}_width"]
        if name not in fields:
            fields[name] = usual_num_heads(width) if tower == "vision" or width % 64 else width // 64
            if fields[name] is None:
                raise ValueError(f"{where}: {name} is not in the file and {tower}_width is {width}; give {name}")
            draft.notes.append(f"{name} {fields[name]} assumed from the width {width}")
    return CLIPConfig.from_dict(fields)


def _fields_of_shapes(state: dict[str, Tensor], where: str) -> dict[str, Any]:
    def shape(name: str, dims: int) -> torch.Size:
        tensor = state.get(name)
        if tensor is None or tensor.ndim != dims:
            got = "nothing" if tensor is None else tuple(tensor.shape)
            raise ValueError(f"{where}: {name} must have {dims} dimensions, got {got}")
        return tensor.shape

    width, _, patch, _ = shape("visual.conv1.weight", 4)
    cells = shape("visual.positional_embedding", 2)[0] - 1
    side = round(max(cells, 0) ** 0.5)
    if side < 1 or side * side != cells:
        raise ValueError(
            f"{where}: visual.positional_embedding has {cells + 1} rows, but a class token and a square grid of cells "
            "make 1 + side * side"
        )
    vocabulary, text_width = shape("text.token_embedding.weight", 2)
    return {
        "embed_dim": shape("visual.proj", 2)[1],
        "image_size": side * patch,
        "patch_size": patch,
        "vision_width": width,
        "vision_depth": _depth(state, "visual."),
        "vision_mlp_ratio": shape("visual.transformer.resblocks.0.mlp.fc1.weight", 2)[0] / width,
        "context_length": shape("text.positional_embedding", 2)[0],
        "vocab_size": vocabulary,
        "text_width": text_width,
        "text_depth": _depth(state, "text."),
        "text_mlp_ratio": shape("text.transformer.resblocks.0.mlp.fc1.weight", 2)[0] / text_width,
    }


def _depth(state: dict[str, Tensor], tower: str) -> int:
    blocks = [int(match[2]) for match in map(_BLOCK.fullmatch, state) if match and match[1] == tower]
    return max(blocks, default=-1) + 1


def _check_layout(state: dict[str, Tensor], config: CLIPConfig, where: str, draft: _Draft) -> None:
    shapes = clip_shapes(config)
    origin = {own: name for name, own in draft.names.items()}
    for name, tensor in state.items():
        written = origin.get(name, name)
        if name not in shapes:
            raise ValueError(f"{where}: holds {written}, which CLIP has no place for")
        if tensor.shape != shapes[name]:
            raise ValueError(
                f"{where}: {written} has shape {tuple(tensor.shape)}, but the config makes it {tuple(shapes[name])}"
            )
    lacking = [name for name in shapes if name not in state]
    if lacking:
        raise ValueError(f"{where}: lacks {len(lacking)} tensors of the model, among them {', '.join(lacking[:3])}")


def clip_shapes(config: CLIPConfig) -> dict[str, torch.Size]:
    """Name -> shape of every tensor in CLIP(config)'s state dict."""
    from ..clip import CLIP

    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in CLIP(config).state_dict().items()}
