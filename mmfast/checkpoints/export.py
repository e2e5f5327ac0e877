"""The tensors of a model in the names of VideoMAE, MM-CDFSL and Hugging Face, for their own strict loaders."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..config import MAEConfig, ViTConfig
from .hf_videomae import ACTIVATIONS, RENAMES_IN_LAYER
from .layout import BLOCK, PATCH_EMBED, canonical_shapes, model_name, set_qkv_bias

EXPORTS = ("videomae_finetune", "hf_videomae", "hf_videomae_v5")
MAE_EXPORTS = ("videomae_pretrain", "mmcdfsl_pretrain", "hf_videomae_pretrain", "hf_videomae_pretrain_v5")


def export_state(state: Mapping[str, Tensor], config: ViTConfig, dialect: str) -> dict[str, Tensor]:
    """The tensors of a MaskedViT under another project's names, for its strict loader. Shares memory where it can.

    dialect: "videomae_finetune" (MCG-NJU), "hf_videomae" (q_bias and v_bias: transformers 4, and 5 from 5.23) or
    "hf_videomae_v5" (query, key and value biases: 5.17). `export_config` has the config.json of the latter two.
    ValueError for a model that the other project cannot compute, as both norms of MM-CDFSL; its fc_norm eps may differ.
    """
    if dialect not in EXPORTS:
        raise ValueError(f"dialect must be one of {', '.join(EXPORTS)}, got {dialect!r}")
    if isinstance(config, MAEConfig):
        raise ValueError("config is a MaskedAutoencoder's: use export_mae_state")
    _check_layout(state, config)
    _refuse(dialect, _inexact(config, dialect))
    if dialect == "videomae_finetune":
        return dict(state)
    return _to_hf(_with_biases_of(dialect, state, config), "" if _bare(config) else "videomae.")


def export_mae_state(state: Mapping[str, Tensor], config: MAEConfig, dialect: str) -> dict[str, Tensor]:
    """The tensors of a MaskedAutoencoder under another project's names, as export_state gives a MaskedViT's.

    dialect: "videomae_pretrain" (MCG-NJU, OpenGVLab), "mmcdfsl_pretrain" (stage 1, with classes), "hf_videomae_pretrain" or
    "hf_videomae_pretrain_v5" (VideoMAEForPreTraining; the biases as in export_state). `export_config` has the config.json
    of the latter two, whose decoder.norm computes with eps 1e-5 whatever norm_eps is.
    """
    if dialect not in MAE_EXPORTS:
        raise ValueError(f"dialect must be one of {', '.join(MAE_EXPORTS)}, got {dialect!r}")
    if not isinstance(config, MAEConfig):
        raise TypeError(f"config must be a MAEConfig, got {type(config).__name__}")
    _check_layout(state, config)
    _refuse(dialect, _inexact_mae(config, dialect))
    if dialect == "videomae_pretrain":
        return dict(state)
    if dialect == "mmcdfsl_pretrain":
        return {
            name.replace("head.", "head_action.") if name.startswith("head.") else name: t for name, t in state.items()
        }
    canonical = {name.removeprefix("encoder."): tensor for name, tensor in state.items()}
    return _to_hf(_with_biases_of(dialect, canonical, config), "videomae.")


def export_config(config: ViTConfig) -> dict[str, Any]:
    """Hugging Face's config.json for what `export_state` or, of a MAEConfig, `export_mae_state` writes for it."""
    if isinstance(config, MAEConfig):
        _refuse("hf_videomae_pretrain", _inexact_mae(config, "hf_videomae_pretrain"))
        return _hf_config(config, "VideoMAEForPreTraining") | {
            "use_mean_pooling": False,  # which is how transformers says that the encoder has a final norm
            "decoder_hidden_size": config.decoder_embed_dim,
            "decoder_num_hidden_layers": config.decoder_depth,
            "decoder_num_attention_heads": config.decoder_num_heads,
            "decoder_intermediate_size": config.decoder.mlp_dim,
            "norm_pix_loss": config.normalize_target,
        }
    _refuse("hf_videomae", _inexact(config, "hf_videomae"))
    about = _hf_config(config, "VideoMAEModel" if _bare(config) else "VideoMAEForVideoClassification")
    if not _bare(config):  # transformers counts the labels by their names
        about["id2label"] = {str(k): f"LABEL_{k}" for k in range(config.num_classes)}
        about["label2id"] = {f"LABEL_{k}": k for k in range(config.num_classes)}
    return about


def export_preprocessor(config: ViTConfig) -> dict[str, Any]:
    """Hugging Face's preprocessor_config.json for a model of RGB: how its clips are resized and normalised."""
    height, width = config.frame_size
    return {
        "image_processor_type": "VideoMAEImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": min(height, width)},
        "resample": 2,  # bilinear
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
    }


def _hf_config(config: ViTConfig, architecture: str) -> dict[str, Any]:
    return {
        "model_type": "videomae",
        "architectures": [architecture],
        "image_size": config.img_size if isinstance(config.img_size, int) else list(config.img_size),
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


def _bare(config: ViTConfig) -> bool:
    """Whether transformers has this as VideoMAEModel, whose names have no root."""
    return not config.num_classes and not config.fc_norm


def _check_layout(state: Mapping[str, Tensor], config: ViTConfig) -> None:
    shapes = {model_name(name, config): shape for name, shape in canonical_shapes(config).items()}
    wrong = sorted(n for n in {*state, *shapes} if n not in state or n not in shapes or state[n].shape != shapes[n])
    if wrong:
        raise ValueError(f"state must have the layout of config; it differs in {', '.join(wrong[:5])}")


def _refuse(dialect: str, reasons: list[str]) -> None:
    if reasons:
        raise ValueError(f"{dialect} has no model with {', nor with '.join(reasons)}")


def _inexact(config: ViTConfig, dialect: str) -> list[str]:
    hf = dialect.startswith("hf_")
    reasons = []
    if config.final_norm and config.fc_norm:
        reasons.append("final_norm and fc_norm at once")
    if config.fc_norm != (config.pool == "mean") and (config.num_classes or config.fc_norm):
        reasons.append(f'pool "{config.pool}" with{"" if config.fc_norm else "out"} fc_norm')
    if not config.final_norm and not config.fc_norm and (config.num_classes or not hf):
        reasons.append("neither final_norm nor fc_norm")
    return reasons + _inexact_blocks(config, hf)


def _inexact_mae(config: MAEConfig, dialect: str) -> list[str]:
    hf = dialect.startswith("hf_")
    reasons = []
    if config.num_classes and dialect != "mmcdfsl_pretrain":
        reasons.append("num_classes above 0 (from_pretrained(..., num_classes=0) leaves the class branch out)")
    if dialect == "mmcdfsl_pretrain" and not (config.num_classes and config.fc_norm):
        reasons.append("no classes" if not config.num_classes else "no fc_norm")
    if not hf and config.decoder.mlp_dim != int(config.decoder_embed_dim * config.mlp_ratio + 1e-6):
        reasons.append(f"decoder_mlp_ratio {config.decoder_mlp_ratio:g} and mlp_ratio {config.mlp_ratio:g}")
    return reasons + _inexact_blocks(config, hf)


def _inexact_blocks(config: ViTConfig, hf: bool) -> list[str]:
    reasons = []
    if hf and config.init_values > 0:
        reasons.append("init_values above 0")
    if config.adapter_hidden:
        reasons.append("adapters")
    if not hf and config.gelu != "erf":
        reasons.append(f'gelu "{config.gelu}"')
    if not hf and config.qkv_bias == "full":
        reasons.append('qkv_bias "full"')
    return reasons


def _with_biases_of(dialect: str, state: Mapping[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """The biases of q, k and v as a version of transformers has them: "full" from 5.17, "qv" before and after."""
    rewritten = dict(state)
    if config.qkv_bias != "none":
        set_qkv_bias(rewritten, "full" if dialect.endswith("_v5") else "qv")
    return rewritten


def _to_hf(state: Mapping[str, Tensor], root: str) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        block = BLOCK.fullmatch(name)
        if block is None:
            out[_hf_name(name, root)] = tensor
            continue
        layer = f"decoder.decoder_layers.{block[2]}." if block[1] else f"{root}encoder.layer.{block[2]}."
        rest = block[3]
        if rest in ("attn.qkv.weight", "attn.qkv.bias"):
            for which, part in zip(("query", "key", "value"), torch.chunk(tensor, 3), strict=True):
                out[f"{layer}attention.attention.{which}.{rest.rpartition('.')[2]}"] = part
        elif rest in ("attn.q_bias", "attn.v_bias"):
            out[f"{layer}attention.attention.{rest.removeprefix('attn.')}"] = tensor
        else:
            old, new = next((old, new) for old, new in RENAMES_IN_LAYER.items() if rest.startswith(new))
            out[layer + rest.replace(new, old, 1)] = tensor
    return out


def _hf_name(name: str, root: str) -> str:
    if name in PATCH_EMBED:
        return name.replace("patch_embed.proj.", f"{root}embeddings.patch_embeddings.projection.")
    if name.startswith("norm."):
        return f"{root}layer{name}"
    return name.replace("head.", "classifier.") if name.startswith("head.") else name
