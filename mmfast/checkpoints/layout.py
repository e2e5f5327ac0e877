"""The canonical layout: MaskedViT's tensor names and shapes, and fitting a file's tensors to a config.

The names are those of VideoMAE's fine-tuned models (MCG-NJU). A dialect only renames into them; what all have in common
is here: geometry read off the shapes, query/key/value biases, heads that change, what is missing or left over.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..config import ViTConfig, usual_num_heads
from .container import Source

PATCH_EMBED = ("patch_embed.proj.weight", "patch_embed.proj.bias")
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
# Names a dialect hands to `fit`, which refuses those MaskedViT has no place for: they change what the model computes.
_OF_THE_MODEL = re.compile(
    r"(patch_embed|blocks|norm|fc_norm|head)\..+|norm_pre\..+|cls_token|pos_embed|temporal_embed"
)
# The overrides that may leave out a tensor of the file or make a new one.
_ASKED_BY = (
    (re.compile(r"patch_embed\.proj\..+"), {"in_chans", "patch_size", "tubelet_size"}),
    (re.compile(r"norm\.(weight|bias)"), {"final_norm"}),
    (re.compile(r"fc_norm\.(weight|bias)"), {"fc_norm"}),
    (re.compile(r"head\.(weight|bias)"), {"num_classes"}),
    (re.compile(r"blocks\.\d+\.gamma_[12]"), {"init_values"}),
    (re.compile(r"blocks\.\d+\.attn\.(q_bias|v_bias|qkv\.bias)"), {"qkv_bias"}),
)


@dataclass
class Draft:
    """A file in canonical names, before any override: what a dialect's `convert` returns."""

    state: dict[str, Tensor]
    origin: dict[str, str]  # canonical name -> name in Source.tensors
    fields: dict[str, Any] = field(default_factory=dict)  # config fields the dialect knows; shapes tell the others
    dropped: list[str] = field(default_factory=list)  # in the names of Source.tensors
    notes: list[str] = field(default_factory=list)
    key_biases: list[str] = field(default_factory=list)  # names in Source.tensors, left out unless qkv_bias is "full"


@dataclass(frozen=True)
class Dialect:
    """One naming of checkpoints: `why_not` tells why a file is none of it, `convert` renames one that is."""

    name: str
    why_not: Callable[[Source], str | None]
    convert: Callable[[Source, str | None, str | None], Draft]  # source, branch, head
    choices: bool = False  # whether branch and head mean something


def renamed(tensors: dict[str, Tensor], origin: dict[str, str]) -> Draft:
    """The draft of tensors in canonical names; what is neither encoder, norm nor head is left out."""
    state = {name: tensor for name, tensor in tensors.items() if _OF_THE_MODEL.fullmatch(name)}
    return Draft(state, origin, dropped=[origin[name] for name in tensors if name not in state])


def canonical_shapes(config: ViTConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in the state dict of MaskedViT(config)."""
    dim, hidden = config.embed_dim, config.mlp_dim
    pair = lambda name, rows: {f"{name}.weight": (rows,), f"{name}.bias": (rows,)}
    linear = lambda name, rows, cols: {f"{name}.weight": (rows, cols), f"{name}.bias": (rows,)}
    patch = (config.in_chans, config.tubelet_size, config.patch_size, config.patch_size)
    shapes: dict[str, tuple[int, ...]] = {PATCH_EMBED[0]: (dim, *patch), PATCH_EMBED[1]: (dim,)}
    for n in range(config.depth):
        block = f"blocks.{n}"
        shapes |= pair(f"{block}.norm1", dim)
        shapes[f"{block}.attn.qkv.weight"] = (3 * dim, dim)
        if config.qkv_bias == "full":
            shapes[f"{block}.attn.qkv.bias"] = (3 * dim,)
        if config.qkv_bias == "qv":
            shapes |= {f"{block}.attn.q_bias": (dim,), f"{block}.attn.v_bias": (dim,)}
        shapes |= linear(f"{block}.attn.proj", dim, dim) | pair(f"{block}.norm2", dim)
        shapes |= linear(f"{block}.mlp.fc1", hidden, dim) | linear(f"{block}.mlp.fc2", dim, hidden)
        if config.init_values > 0:
            shapes |= {f"{block}.gamma_1": (dim,), f"{block}.gamma_2": (dim,)}
    if config.final_norm:
        shapes |= pair("norm", dim)
    if config.fc_norm:
        shapes |= pair("fc_norm", dim)
    if config.num_classes:
        shapes |= linear("head", config.num_classes, dim)
    return shapes


def read_config(draft: Draft, overrides: dict[str, Any], where: str) -> ViTConfig:
    """The config of a file: its dialect's fields, the rest from shapes, then the overrides. May add to draft.notes."""
    fields = {**_fields_of_shapes(draft.state, where), **draft.fields}
    in_file = dict(fields)
    fields.update(overrides)
    if "num_heads" not in fields:
        heads = usual_num_heads(fields["embed_dim"])
        if heads is None:
            raise ValueError(
                f"{where}: num_heads is not in the file and embed_dim is {fields['embed_dim']}; give num_heads"
            )
        fields["num_heads"] = heads
        draft.notes.append(f"num_heads {heads} assumed from the width {fields['embed_dim']}")
    fields.setdefault("img_size", 14 * fields["patch_size"])
    if fields["in_chans"] != in_file["in_chans"]:
        # Statistics of other channels do not apply; ViTConfig has its own for the new number.
        for name in {"mean", "std"} - set(overrides):
            fields.pop(name, None)
    return ViTConfig.from_dict(fields)


def _fields_of_shapes(state: dict[str, Tensor], where: str) -> dict[str, Any]:
    patch = state.get(PATCH_EMBED[0])
    hidden = state.get("blocks.0.mlp.fc1.weight")
    if patch is None or patch.ndim != 5 or patch.shape[3] != patch.shape[4]:
        got = "nothing" if patch is None else tuple(patch.shape)
        raise ValueError(f"{where}: patch embedding must be [D, C, tubelet, patch, patch], got {got}")
    if hidden is None or hidden.ndim != 2:
        raise ValueError(f"{where}: has no first block (blocks.0.mlp.fc1.weight as canonical name)")
    dim, chans, tubelet, size, _ = patch.shape
    blocks = {int(match[1]) for match in map(_BLOCK.match, state) if match}
    return {
        "embed_dim": dim,
        "in_chans": chans,
        "tubelet_size": tubelet,
        "patch_size": size,
        "depth": max(blocks) + 1,
        "mlp_ratio": hidden.shape[0] / dim,
        "num_classes": len(state["head.weight"]) if "head.weight" in state else 0,
        "qkv_bias": _kind_of_bias(state, sorted(blocks), where),
        "final_norm": "norm.weight" in state,
        "fc_norm": "fc_norm.weight" in state,
        # Only that it is above 0 matters: the values themselves are in the file.
        "init_values": 1.0 if any(name.endswith(".gamma_1") for name in state) else 0.0,
    }


def _kind_of_bias(state: dict[str, Tensor], blocks: list[int], where: str) -> str:
    names = ("q_bias", "v_bias", "qkv.bias")
    held = {n: frozenset(name for name in names if f"blocks.{n}.attn.{name}" in state) for n in blocks}
    kinds = {frozenset(): "none", frozenset(names[:2]): "qv", frozenset(names[2:]): "full"}
    for n, found in held.items():
        if found not in kinds or found != held[blocks[0]]:
            have = lambda n: f"block {n} has {' and '.join(sorted(held[n])) or 'none'}"
            rule = "query and value biases must be in all blocks or in none"
            raise ValueError(f"{where}: {rule}; {have(blocks[0])}, {have(n)}")
    return kinds[held[blocks[0]]]


def set_qkv_bias(state: dict[str, Tensor], want: str) -> None:
    """Rewrite the biases of every block from "full" to "qv" or back, exactly.

    A key bias adds one number to every score of a query, which softmax ignores: leaving it out changes nothing.
    """
    for name in [name for name in state if name.endswith(".attn.qkv.weight")]:
        qkv, q, v = (name.replace("qkv.weight", bias) for bias in ("qkv.bias", "q_bias", "v_bias"))
        if want == "qv" and qkv in state:
            state[q], _, state[v] = state.pop(qkv).chunk(3)
        elif want == "full" and q in state:
            state[qkv] = torch.cat([state[q], torch.zeros_like(state[q]), state[v]])
            del state[q], state[v]


def fit(draft: Draft, config: ViTConfig, overridden: set[str], where: str) -> tuple[list[str], list[str]]:
    """Leave in draft.state what MaskedViT(config) takes; gives the names it must initialise and those left out.

    Only what an override asks for is initialised or left out. Any other tensor that is missing, of another shape or
    unknown raises ValueError, because the model would not compute what the file's did.
    """
    state, shapes = draft.state, canonical_shapes(config)
    asked = lambda name: any(pattern.fullmatch(name) and fields & overridden for pattern, fields in _ASKED_BY)
    dropped: list[str] = []
    for pair in (PATCH_EMBED, ("head.weight", "head.bias")):
        if asked(pair[0]) and any(name in state and state[name].shape != shapes.get(name) for name in pair):
            dropped += [name for name in pair if state.pop(name, None) is not None]
    for name in list(state):
        block = _BLOCK.match(name)
        if name not in shapes:
            if not asked(name) and not ("depth" in overridden and block and int(block[1]) >= config.depth):
                raise ValueError(f"{where}: holds {draft.origin.get(name, name)}, which MaskedViT has no place for")
            del state[name]
            dropped.append(name)
        elif state[name].shape != shapes[name]:
            got = f"{draft.origin.get(name, name)} has shape {tuple(state[name].shape)}"
            raise ValueError(f"{where}: {got}, but the config makes it {shapes[name]}")
    initialised = [name for name in shapes if name not in state]
    for name in initialised:
        if not asked(name):
            raise ValueError(f"{where}: has no {name}, which a model of depth {config.depth} needs")
    return initialised, [draft.origin.get(name, name) for name in dropped]
