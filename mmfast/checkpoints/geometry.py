"""The config of a checkpoint: what its dialect knows, the rest read off the shapes of its tensors, then the overrides."""

import re
from typing import Any

from torch import Tensor

from ..config import MAEConfig, ViTConfig, list_models, mae_from_name, usual_num_heads
from .layout import BLOCK, PATCH_EMBED, Draft

_ADAPTER = re.compile(r"blocks\.(\d+)\.adapter_pre_(attn|mlp)\.fc1\.weight")


def read_config(draft: Draft, kind: type[ViTConfig], overrides: dict[str, Any], where: str) -> ViTConfig:
    """A ViTConfig or, by `kind`, a MAEConfig for a file. May add to draft.notes."""
    fields = {**_fields_of_shapes(draft.state, where), **draft.fields}
    if kind is MAEConfig:
        fields |= _decoder_fields(draft, fields, overrides, where)
    in_file = dict(fields)
    fields.update(overrides)
    _fill_heads(draft, fields, "num_heads", usual_num_heads(fields["embed_dim"]), where)
    if kind is MAEConfig:
        _fill_heads(draft, fields, "decoder_num_heads", _usual_decoder_heads(fields["decoder_embed_dim"]), where)
    # All published models see 14 x 14 tokens a frame, but the giant one, of patches of 14 pixels, 16 x 16.
    fields.setdefault("img_size", 224 if fields["patch_size"] == 14 else 14 * fields["patch_size"])
    if fields["in_chans"] != in_file["in_chans"]:
        # Statistics of other channels do not apply; ViTConfig has its own for the new number.
        for name in {"mean", "std"} - set(overrides):
            fields.pop(name, None)
    return kind.from_dict(fields)


def _fill_heads(draft: Draft, fields: dict[str, Any], name: str, usual: int | None, where: str) -> None:
    if name in fields:
        return
    width = name.replace("num_heads", "embed_dim")
    if usual is None:
        raise ValueError(f"{where}: {name} is not in the file and {width} is {fields[width]}; give {name}")
    fields[name] = usual
    draft.notes.append(f"{name} {usual} assumed from the width {fields[width]}")


def _fields_of_shapes(state: dict[str, Tensor], where: str) -> dict[str, Any]:
    patch = state.get(PATCH_EMBED[0])
    hidden = state.get("blocks.0.mlp.fc1.weight")
    if patch is None or patch.ndim != 5 or patch.shape[3] != patch.shape[4]:
        got = "nothing" if patch is None else tuple(patch.shape)
        raise ValueError(f"{where}: patch embedding must be [D, C, tubelet, patch, patch], got {got}")
    if hidden is None or hidden.ndim != 2:
        raise ValueError(f"{where}: has no first block (blocks.0.mlp.fc1.weight as canonical name)")
    dim, chans, tubelet, size, _ = patch.shape
    return {
        "embed_dim": dim,
        "in_chans": chans,
        "tubelet_size": tubelet,
        "patch_size": size,
        "depth": _depth(state, ""),
        "mlp_ratio": hidden.shape[0] / dim,
        "num_classes": len(state["head.weight"]) if "head.weight" in state else 0,
        "qkv_bias": _kind_of_bias(state, where),
        "final_norm": "norm.weight" in state,
        "fc_norm": "fc_norm.weight" in state,
        # Only that it is above 0 matters: the values themselves are in the file.
        "init_values": 1.0 if any(name.endswith(".gamma_1") for name in state) else 0.0,
        **_adapters(state, where),
    }


def _adapters(state: dict[str, Tensor], where: str) -> dict[str, Any]:
    """Where a file has adapters, and how wide they are."""
    found: dict[str, dict[int, int]] = {}
    for name, tensor in state.items():
        if place := _ADAPTER.fullmatch(name):
            found.setdefault(place[2], {})[int(place[1])] = len(tensor)
    if not found:
        return {}
    first, *others = found.values()
    if any(other != first for other in others) or len(set(first.values())) > 1:
        raise ValueError(f"{where}: adapters must be equally wide and stand in the same blocks before attn and mlp")
    layers = tuple(sorted(first))
    all_of_them = len(layers) == _depth(state, "")
    return {
        "adapter_hidden": first[layers[0]],
        "adapter_before": tuple(found),
        "adapter_layers": None if all_of_them else layers,
    }


def _decoder_fields(draft: Draft, encoder: dict[str, Any], overrides: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of a MAEConfig that differ from those of a ViTConfig. A decoder that is not in the file is a published one."""
    state = draft.state
    # Without a head fc_norm is not in the file, and says how the class branch would be.
    fields = {"final_norm": True, "fc_norm": encoder["fc_norm"] or "head.weight" not in state}
    if draft.has_decoder:
        fields |= _decoder_of_shapes(state, where) | draft.mae_fields
        if overrides.get("decoder_embed_dim", fields["decoder_embed_dim"]) != fields["decoder_embed_dim"]:
            fields.pop("decoder_num_heads", None)
    elif "decoder_embed_dim" not in overrides:
        dim = encoder["embed_dim"]
        published = {c.embed_dim: c.decoder_embed_dim for c in _published()}
        if dim not in published and dim % 2:
            raise ValueError(f"{where}: has no decoder and embed_dim is {dim}; give decoder_embed_dim")
        fields["decoder_embed_dim"] = published.get(dim, dim // 2)
    return fields


def _decoder_of_shapes(state: dict[str, Tensor], where: str) -> dict[str, Any]:
    for name in ("encoder_to_decoder.weight", "decoder.blocks.0.mlp.fc1.weight"):
        if name not in state or state[name].ndim != 2:
            raise ValueError(f"{where}: has a decoder, but no {name}, so it is no VideoMAE pre-training model")
    width = state["encoder_to_decoder.weight"].shape[0]
    return {
        "decoder_embed_dim": width,
        "decoder_depth": _depth(state, "decoder."),
        "decoder_mlp_ratio": state["decoder.blocks.0.mlp.fc1.weight"].shape[0] / width,
    }


def _published() -> list[MAEConfig]:
    return [mae_from_name(name) for name in list_models() if name.startswith("pretrain_")]


def _usual_decoder_heads(width: int) -> int | None:
    """As usual_num_heads; the decoder of the huge model has heads of 80 channels."""
    return {c.decoder_embed_dim: c.decoder_num_heads for c in _published()}.get(width) or usual_num_heads(width)


def _blocks(state: dict[str, Tensor], stack: str) -> list[int]:
    found = (match for match in map(BLOCK.match, state) if match)
    return sorted({int(match[2]) for match in found if (match[1] or "") == stack})


def _depth(state: dict[str, Tensor], stack: str) -> int:
    return max(_blocks(state, stack)) + 1


def _kind_of_bias(state: dict[str, Tensor], where: str) -> str:
    names = ("q_bias", "v_bias", "qkv.bias")
    blocks = [f"{stack}blocks.{n}" for stack in ("", "decoder.") for n in _blocks(state, stack)]
    held = {block: frozenset(name for name in names if f"{block}.attn.{name}" in state) for block in blocks}
    kinds = {frozenset(): "none", frozenset(names[:2]): "qv", frozenset(names[2:]): "full"}
    for block, found in held.items():
        if found not in kinds or found != held[blocks[0]]:
            have = lambda block: (
                f"{block.replace('blocks.', 'block ')} has {' and '.join(sorted(held[block])) or 'none'}"
            )
            rule = "query and value biases must be in all blocks or in none"
            raise ValueError(f"{where}: {rule}; {have(blocks[0])}, {have(block)}")
    return kinds[held[blocks[0]]]
