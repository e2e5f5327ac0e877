"""Hugging Face's VideoMAE: the bare model, the classifier and the pre-training model, with or without config.json.

Three dialects differ in the biases: q_bias and v_bias (transformers 4 and the files on the Hub), query, key and value
biases (5.17), query and value biases (5.23). Each has a matrix for queries, keys and values, packed here in that order.
"""

import re
from typing import Any

import torch

from .container import Source
from .layout import Dialect, Draft
from .videomae import draft_of

_PATCH = "embeddings.patch_embeddings.projection.weight"
_LAYER = re.compile(r"encoder\.layer\.(\d+)\.(.+)")
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
FC_NORM_EPS = 1e-5  # not in its config: nn.LayerNorm's own


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
            block, rest = layer.groups()
            if match := _ATTENTION.fullmatch(rest):
                kind, which = (match[2], match[1][0]) if match[1] else ("bias", match[3])
                if packed.setdefault((block, kind), {}).setdefault(which, name) != name:
                    raise ValueError(f"{source.where}: {packed[block, kind][which]} and {name} are the same bias")
                continue
            old = next((old for old in RENAMES_IN_LAYER if rest.startswith(old)), None)
            if old is None:
                raise ValueError(f"{source.where}: holds {name}, which MaskedViT has no place for")
            names[name] = f"blocks.{block}.{rest.replace(old, RENAMES_IN_LAYER[old], 1)}"
        elif short.startswith("embeddings.patch_embeddings.projection."):
            names[name] = short.replace("embeddings.patch_embeddings.projection.", "patch_embed.proj.")
        elif short == "embeddings.position_embeddings":
            names[name] = "pos_embed"
        elif short.startswith("layernorm."):
            names[name] = short.replace("layernorm.", "norm.")
        elif name.startswith(("fc_norm.", "classifier.")):
            names[name] = name.replace("classifier.", "head.")
        else:
            dropped.append(name)
    draft = draft_of(source, names)
    draft.dropped += dropped
    for (block, kind), parts in packed.items():
        _pack(draft, source, f"blocks.{block}.attn", kind, parts)
    if draft.key_biases:
        draft.fields["qkv_bias"] = "qv"
        draft.notes.append(f"{len(draft.key_biases)} key biases left out, exactly: softmax ignores them")
    draft.fields |= _fields_of(source.config, source.where)
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
        draft.origin[f"{attn}.qkv.{kind}"] = ", ".join(parts[which] for which in "qkv")
    else:
        for which in set(parts) & {"q", "v"}:
            draft.state[f"{attn}.{which}_bias"] = tensors[which]
            draft.origin[f"{attn}.{which}_bias"] = parts[which]
    if kind == "bias" and "k" in parts:
        draft.key_biases.append(parts["k"])


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
    }


HF_VIDEOMAE = Dialect("hf_videomae", _why_not, _convert)
