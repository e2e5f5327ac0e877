"""State dicts of every checkpoint dialect, from random weights, written out from the published names."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from mmfast.config import ViTConfig
from mmfast.vit import MaskedViT

State = dict[str, Tensor]


def tiny_config(**overrides: Any) -> ViTConfig:
    """Two blocks of width 64 over 2 x 2 x 2 tokens."""
    tiny = dict(img_size=32, embed_dim=64, depth=2, num_heads=2, num_frames=4, num_classes=5)
    return ViTConfig.from_dict({**tiny, **overrides})


def canonical(config: ViTConfig, seed: int = 0) -> State:
    """The state dict of MaskedViT(config), every tensor random."""
    draw = torch.Generator().manual_seed(seed)
    state = MaskedViT(config).state_dict()
    return {name: torch.randn(t.shape, generator=draw) * 0.1 for name, t in state.items()}


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def decoder(config: ViTConfig, width: int = 32, seed: int = 1) -> State:
    """The names beside `encoder.` in a pre-training model of MCG-NJU."""
    small = tiny_config(embed_dim=width, depth=1, num_classes=7, fc_norm=False, final_norm=True)
    inner = canonical(small, seed)
    state = {f"decoder.{name}": t for name, t in inner.items() if not name.startswith("patch_embed.")}
    return state | {
        "mask_token": torch.zeros(1, 1, width),
        "encoder_to_decoder.weight": torch.zeros(width, config.embed_dim),
    }


def videomae_pretrain(config: ViTConfig, seed: int = 0) -> State:
    """An encoder with its norm, no head."""
    return prefixed(canonical(config, seed), "encoder.") | decoder(config)


def mmcdfsl_classifier(state: State, heads: dict[str, int]) -> State:
    """A canonical state with norm, fc_norm and head under MM-CDFSL's names, the head as head_action, others random."""
    out = {name if name.startswith(("fc_norm.", "head.")) else f"encoder.{name}": t for name, t in state.items()}
    out = {name.replace("head.", "head_action."): t for name, t in out.items()}
    width = state["norm.weight"].shape[0]
    for seed, (head, classes) in enumerate(heads.items()):
        draw = torch.Generator().manual_seed(100 + seed)
        out[f"head_{head}.weight"] = torch.randn(classes, width, generator=draw)
        out[f"head_{head}.bias"] = torch.randn(classes, generator=draw)
    return out


def mmcdfsl_stage1(config: ViTConfig, prefix: str = "_forward_module.model.", seed: int = 0) -> State:
    return prefixed(mmcdfsl_classifier(canonical(config, seed), {}) | decoder(config), prefix)


def mmcdfsl_stage2(config: ViTConfig, prefix: str = "_forward_module.") -> State:
    """student_rgb (seed 0), teacher_rgb (1), teacher_flow (2, two channels), teacher_pose (3, 21 channels) and cmt."""
    channels = {"student_rgb": 3, "teacher_rgb": 3, "teacher_flow": 2, "teacher_pose": 21}
    out: State = {f"{prefix}cmt.mlp_to_flow.0.weight": torch.zeros(64, 64)}
    for seed, (branch, chans) in enumerate(channels.items()):
        small = dict(img_size=8, patch_size=4) if branch == "teacher_pose" else {}
        own = {**config.to_dict(), "in_chans": chans, "mean": None, "std": None, **small}
        state = canonical(ViTConfig.from_dict(own), seed)
        out |= prefixed(mmcdfsl_classifier(state, {"verb": 3, "noun": 4}), f"{prefix}{branch}.")
    return out


_HF_LAYER = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def hf_videomae(state: State, biases: str = "4.57", root: str = "videomae.") -> State:
    """A canonical state in Hugging Face's names, the biases as transformers 4.57, 5.17 or 5.23 have them."""
    out: State = {}
    for name, tensor in state.items():
        if name.startswith("patch_embed."):
            out[name.replace("patch_embed.proj", f"{root}embeddings.patch_embeddings.projection")] = tensor
        elif name.startswith("blocks."):
            _, n, rest = name.split(".", 2)
            layer = f"{root}encoder.layer.{n}"
            if rest == "attn.qkv.weight":
                for which, part in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                    out[f"{layer}.attention.attention.{which}.weight"] = part
            elif rest in ("attn.q_bias", "attn.v_bias"):
                which = rest.removeprefix("attn.")
                modern = {"q_bias": "query.bias", "v_bias": "value.bias"}[which]
                out[f"{layer}.attention.attention.{which if biases == '4.57' else modern}"] = tensor
                if biases == "5.17":
                    out[f"{layer}.attention.attention.key.bias"] = torch.full_like(tensor, 0.25)
            else:
                own, kind = rest.rsplit(".", 1)
                out[f"{layer}.{_HF_LAYER[own]}.{kind}"] = tensor
        elif name.startswith("norm."):
            out[name.replace("norm.", f"{root}layernorm.")] = tensor
        else:
            out[name.replace("head.", "classifier.")] = tensor
    return out


def hf_config(config: ViTConfig, **changes: Any) -> dict[str, Any]:
    """config.json as transformers writes it for this geometry."""
    return {
        "model_type": "videomae",
        "image_size": config.img_size,
        "patch_size": config.patch_size,
        "num_channels": config.in_chans,
        "num_frames": config.num_frames,
        "tubelet_size": config.tubelet_size,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "qkv_bias": True,
        "use_mean_pooling": True,
        **changes,
    }


def save_hf(folder: Path, state: State, config: dict[str, Any]) -> Path:
    folder.mkdir()
    safetensors.torch.save_file({n: t.clone().contiguous() for n, t in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def assert_same(got: State, expected: State) -> None:
    assert got.keys() == expected.keys()
    wrong = [name for name in got if not torch.equal(got[name], expected[name])]
    assert not wrong
