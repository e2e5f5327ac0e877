"""Hugging Face's VideoMAE: the bare model, the classifier and the pre-training model, with or without config.json.

Three dialects differ in the biases: q_bias and v_bias (transformers 4 and the files on the Hub), query, key and value
biases (5.17), query and value biases (5.23). Each has a matrix for queries, keys and values, packed here in that order.
The decoder's layers are named as the encoder's are; its norm has nn.LayerNorm's own eps, whatever config.json says.
"""

import re
from typing import Any

import torch

from .container import Source, pixel_fields
from .layout import DECODER, Dialect, Draft, draft_of

_PATCH = "embeddings.patch_embeddings.projection.weight"
_LAYER = re.compile(r"(encoder\.layer|decoder\.decoder_layers)\.(\d+)\.(.+)")
_STACKS = {"encoder.layer": "blocks", "decoder.decoder_layers": "decoder.blocks"}
_ATTENTION = re.compile(r"attention\.attention\.(query|key|value)\.(weight|bias)|attention\.attention\.([qv])_bias")
# Longest first: "attention.output.dense." ends in the name of another.
RENAMES_IN_LAYER = {
    "attention.output.dense.": "attn.proj.",
    "layernorm_before.": "norm1.",
    "layernorm_after.": "norm2.",
    "intermediate.dense.": "mlp.fc1.",
    "output.dense.": "mlp.fc2.",
}
ACTIVATIONS = {"gelu": "erf", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "quick_gelu": "quick"}
# Without a config.json: what transformers' VideoMAEConfig has.
DEFAULT_EPS = 1e-12
FC_NORM_EPS = DECODER_NORM_EPS = 1e-5  # not in its config: nn.LayerNorm's own


def _why_not(source: Source) -> str | None:
    patch = source.tensors.get(f"videomae.{_PATCH}", source.tensors.get(_PATCH))
    if patch is None:
        return f"no {_PATCH}"
    if patch.ndim != 5:
        return f"its patch embedding has {patch.ndim} dimensions, so it is an image model"
    kind = (source.config or {}).get("model_type", "videomae")
    if kind != "videomae":
        return f"config.json is of a {kind!r} model"
    if any(name.endswith("embeddings.cls_token") for name in source.tensors):
        return "it has a class token, so it is no VideoMAE"
    return None


def _convert(source: Source, branch: str | None, head: str | None) -> Draft:
    names: dict[str, str] = {}
    packed: dict[tuple[str, str], dict[str, str]] = {}  # (block, weight | bias) -> q | k | v -> name in the file
    dropped: list[str] = []
    for name in source.tensors:
        short = name.removeprefix("videomae.")
        if layer := _LAYER.fullmatch(short):
            stack, n, rest = layer.groups()
            block = f"{_STACKS[stack]}.{n}"
            if match := _ATTENTION.fullmatch(rest):
                kind, which = (match[2], match[1][0]) if match[1] else ("bias", match[3])
                if packed.setdefault((block, kind), {}).setdefault(which, name) != name:
                    raise ValueError(f"{source.where}: {packed[block, kind][which]} and {name} are the same bias")
                continue
            # An unknown one keeps its name, and the model that has no place for it refuses it.
            old = next((old for old in RENAMES_IN_LAYER if rest.startswith(old)), rest)
            names[name] = f"{block}.{rest.replace(old, RENAMES_IN_LAYER.get(old, old), 1)}"
        elif short.startswith("embeddings.patch_embeddings.projection."):
            names[name] = short.replace("embeddings.patch_embeddings.projection.", "patch_embed.proj.")
        elif short == "embeddings.position_embeddings":
            names[name] = "pos_embed"
        elif short.startswith("layernorm."):
            names[name] = short.replace("layernorm.", "norm.")
        elif name.startswith(("fc_norm.", "classifier.")):
            names[name] = name.replace("classifier.", "head.")
        elif name.startswith(DECODER):
            names[name] = name
        elif name == "position_embeddings":
            names[name] = "decoder.pos_embed"
        else:
            dropped.append(name)
    draft = draft_of(source, names)
    draft.dropped += dropped
    for (block, kind), parts in packed.items():
        _pack(draft, source, f"{block}.attn", kind, parts)
    if draft.key_biases:
        draft.fields["qkv_bias"] = "qv"
    draft.fields |= _fields_of(source.config, source.where)
    if draft.has_decoder:
        draft.mae_fields |= _decoder_fields_of(source.config)
        draft.mae_fields["decoder_norm_eps"] = DECODER_NORM_EPS
    if source.config is None:
        draft.notes.append(f"no config.json: norm_eps {DEFAULT_EPS:g}, as transformers has it by default")
    if "head.weight" in draft.state and "fc_norm.weight" not in draft.state:
        draft.fields["pool"] = "first"
        draft.notes.append("no fc_norm (use_mean_pooling=False): the head reads the first token")
    return draft


def _pack(draft: Draft, source: Source, attn: str, kind: str, parts: dict[str, str]) -> None:
    tensors = {which: source.tensors[name] for which, name in parts.items()}
    if kind == "weight" or set(parts) == {"q", "k", "v"}:
        lacking = [which for which in "qkv" if which not in parts]
        if lacking or len({tuple(t.shape) for t in tensors.values()}) > 1:
            shapes = {parts[which]: tuple(t.shape) for which, t in tensors.items()}
            raise ValueError(f"{source.where}: query, key and value must be there and alike, got {shapes}")
        draft.state[f"{attn}.qkv.{kind}"] = torch.cat([tensors[which] for which in "qkv"])
        draft.origin[f"{attn}.qkv.{kind}"] = tuple(parts[which] for which in "qkv")
    else:
        draft.state |= {f"{attn}.{which}_bias": tensors[which] for which in set(parts) & {"q", "v"}}
    if kind == "bias":
        draft.origin |= {f"{attn}.{which}_bias": (parts[which],) for which in set(parts) & {"q", "v"}}
        draft.key_biases += [parts["k"]] if "k" in parts else []


def _fields_of(config: dict[str, Any] | None, where: str) -> dict[str, Any]:
    if config is None:
        return {"norm_eps": DEFAULT_EPS, "fc_norm_eps": FC_NORM_EPS}
    activation = config.get("hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{where}: hidden_act must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    size = config.get("image_size", 224)
    return {
        "norm_eps": config.get("layer_norm_eps", DEFAULT_EPS),
        "fc_norm_eps": FC_NORM_EPS,
        "num_heads": config.get("num_attention_heads", 12),
        "num_frames": config.get("num_frames", 16),
        "img_size": tuple(size) if isinstance(size, list) else size,
        "gelu": ACTIVATIONS[activation],
        **pixel_fields(config),
    }


def _decoder_fields_of(config: dict[str, Any] | None) -> dict[str, Any]:
    if config is None:
        return {}
    return {
        "decoder_num_heads": config.get("decoder_num_attention_heads", 6),
        "normalize_target": config.get("norm_pix_loss", True),
    }


HF_VIDEOMAE = Dialect("hf_videomae", _why_not, _convert)
