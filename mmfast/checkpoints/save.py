"""Writes mmfast's own folders, and the tensors of a model in the names of VideoMAE and Hugging Face."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..config import ViTConfig
from .hf_videomae import ACTIVATIONS, RENAMES_IN_LAYER
from .layout import PATCH_EMBED, canonical_shapes, set_qkv_bias
from .native import FORMAT, VERSION

EXPORTS = ("videomae_finetune", "hf_videomae", "hf_videomae_v5")


def save_pretrained(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write model.safetensors and config.json, each written aside and then put in place, so that no reader sees half.

    model: has `config`, a ViTConfig.   folder: made if absent; ValueError if it is a file.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, ViTConfig):
        raise TypeError(f"model must have a ViTConfig as config, got {type(config).__name__}")
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise ValueError(f"folder must be a folder, {str(target)!r} is a file")
    target.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}
    about = {"format": FORMAT, "version": VERSION, "model": "MaskedViT", "config": config.to_dict()}
    text = json.dumps(about, indent=2) + "\n"
    _put(target / "model.safetensors", lambda path: safetensors.torch.save_file(state, path, {"format": "pt"}))
    _put(target / "config.json", lambda path: path.write_text(text, encoding="utf-8"))


def _put(path: Path, write: Callable[[Path], Any]) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        aside.touch()
        mode = aside.stat().st_mode  # the user's own; safetensors would leave a file no one else can read
        write(aside)
        aside.chmod(mode)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def export_state(state: Mapping[str, Tensor], config: ViTConfig, dialect: str) -> dict[str, Tensor]:
    """The tensors of a MaskedViT under another project's names, for its strict loader. Shares memory where it can.

    dialect: "videomae_finetune" (MCG-NJU), "hf_videomae" (q_bias and v_bias: transformers 4, and 5 from 5.23) or
    "hf_videomae_v5" (query, key and value biases: 5.17). `export_config` has the config.json of the latter two.
    ValueError for a model that the other project cannot compute, as both norms of MM-CDFSL; its fc_norm eps may differ.
    """
    if dialect not in EXPORTS:
        raise ValueError(f"dialect must be one of {', '.join(EXPORTS)}, got {dialect!r}")
    shapes = canonical_shapes(config)
    wrong = sorted(n for n in {*state, *shapes} if n not in state or n not in shapes or state[n].shape != shapes[n])
    if wrong:
        raise ValueError(f"state must have the layout of config; it differs in {', '.join(wrong[:5])}")
    _refuse_inexact(config, dialect)
    renamed = dict(state)
    if config.qkv_bias == "full" and dialect == "hf_videomae":
        set_qkv_bias(renamed, "qv")
    if config.qkv_bias == "qv" and dialect == "hf_videomae_v5":
        set_qkv_bias(renamed, "full")
    return renamed if dialect == "videomae_finetune" else _to_hf(renamed, config)


def export_config(config: ViTConfig) -> dict[str, Any]:
    """Hugging Face's config.json for what `export_state` writes as "hf_videomae" or "hf_videomae_v5"."""
    _refuse_inexact(config, "hf_videomae")
    size: Any = config.img_size if isinstance(config.img_size, int) else list(config.img_size)
    bare = not config.num_classes and not config.fc_norm
    about = {
        "model_type": "videomae",
        "architectures": ["VideoMAEModel" if bare else "VideoMAEForVideoClassification"],
        "image_size": size,
        "patch_size": config.patch_size,
        "num_channels": config.in_chans,
        "num_frames": config.num_frames,
        "tubelet_size": config.tubelet_size,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "hidden_act": next(act for act, gelu in ACTIVATIONS.items() if gelu == config.gelu),
        "layer_norm_eps": config.norm_eps,
        "qkv_bias": config.qkv_bias != "none",
        "use_mean_pooling": not config.final_norm,
    }
    if not bare:  # transformers counts the labels by their names
        about["id2label"] = {str(k): f"LABEL_{k}" for k in range(config.num_classes)}
        about["label2id"] = {f"LABEL_{k}": k for k in range(config.num_classes)}
    return about


def _refuse_inexact(config: ViTConfig, dialect: str) -> None:
    hf = dialect.startswith("hf_")
    reasons = []
    if config.final_norm and config.fc_norm:
        reasons.append("final_norm and fc_norm at once")
    if config.fc_norm != (config.pool == "mean") and (config.num_classes or config.fc_norm):
        reasons.append(f'pool "{config.pool}" with{"" if config.fc_norm else "out"} fc_norm')
    if not config.final_norm and not config.fc_norm and (config.num_classes or not hf):
        reasons.append("neither final_norm nor fc_norm")
    if hf and config.init_values > 0:
        reasons.append("init_values above 0")
    if not hf and config.gelu != "erf":
        reasons.append(f'gelu "{config.gelu}"')
    if not hf and config.qkv_bias == "full":
        reasons.append('qkv_bias "full"')
    if reasons:
        raise ValueError(f"{dialect} has no model with {', nor with '.join(reasons)}")


def _to_hf(state: dict[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    root = "" if not config.num_classes and not config.fc_norm else "videomae."
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in PATCH_EMBED:
            out[name.replace("patch_embed.proj.", f"{root}embeddings.patch_embeddings.projection.")] = tensor
        elif name.startswith("norm."):
            out[f"{root}layer{name}"] = tensor
        elif name.startswith(("fc_norm.", "head.")):
            out[name.replace("head.", "classifier.")] = tensor
        else:
            _, n, rest = name.split(".", 2)
            layer = f"{root}encoder.layer.{n}."
            if rest in ("attn.qkv.weight", "attn.qkv.bias"):
                for which, part in zip(("query", "key", "value"), torch.chunk(tensor, 3), strict=True):
                    out[f"{layer}attention.attention.{which}.{rest.rpartition('.')[2]}"] = part
            elif rest in ("attn.q_bias", "attn.v_bias"):
                out[f"{layer}attention.attention.{rest.removeprefix('attn.')}"] = tensor
            else:
                old, new = next((old, new) for old, new in RENAMES_IN_LAYER.items() if rest.startswith(new))
                out[layer + rest.replace(new, old, 1)] = tensor
    return out
