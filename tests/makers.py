"""State dicts of every checkpoint dialect, from random weights, written out from the published names."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from mmfast.checkpoints import load_pretrained_mae
from mmfast.config import MAEConfig, ViTConfig
from mmfast.vit import MaskedViT

State = dict[str, Tensor]
# What the shapes in a state dict of tiny_config or tiny_mae_config do not say.
GEOMETRY: dict[str, Any] = dict(num_heads=2, img_size=32, num_frames=4)
MAE_GEOMETRY: dict[str, Any] = dict(**GEOMETRY, decoder_num_heads=2)


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


def tiny_mae_config(**overrides: Any) -> MAEConfig:
    """tiny_config with a decoder of three blocks of width 128, and without classes."""
    tiny = dict(img_size=32, embed_dim=64, depth=2, num_heads=2, num_frames=4)
    inner = dict(decoder_embed_dim=128, decoder_depth=3, decoder_num_heads=2)
    return MAEConfig.from_dict({**tiny, **inner, **overrides})


def decoder(config: ViTConfig, seed: int = 1) -> State:
    """The names beside `encoder.` in a pre-training model of MCG-NJU; of a ViTConfig, with a decoder of 32 channels."""
    draw = torch.Generator().manual_seed(seed)
    inner = config.decoder if isinstance(config, MAEConfig) else tiny_config(embed_dim=32, depth=1, num_classes=0)
    width, pixels = inner.embed_dim, config.in_chans * config.tubelet_size * config.patch_size**2
    blocks = {name: t for name, t in canonical(inner, seed).items() if name.startswith("blocks.")}
    shapes = {"norm.weight": (width,), "norm.bias": (width,), "head.weight": (pixels, width), "head.bias": (pixels,)}
    rest = {f"decoder.{name}": shape for name, shape in shapes.items()}
    rest |= {"mask_token": (1, 1, width), "encoder_to_decoder.weight": (width, config.embed_dim)}
    return prefixed(blocks, "decoder.") | {n: torch.randn(shape, generator=draw) * 0.1 for n, shape in rest.items()}


def videomae_pretrain(config: ViTConfig, seed: int = 0) -> State:
    """An encoder with its norm, no head; a MAEConfig's own decoder and, as MaskedAutoencoder has it, its class branch."""
    if not isinstance(config, MAEConfig):
        return prefixed(canonical(config, seed), "encoder.") | decoder(config)
    state = prefixed(canonical(config.encoder, seed), "encoder.") | decoder(config)
    draw = torch.Generator().manual_seed(seed + 7)
    branch = dict.fromkeys(("fc_norm.weight", "fc_norm.bias"), (config.embed_dim,)) if config.fc_norm else {}
    branch |= {"head.weight": (config.num_classes, config.embed_dim), "head.bias": (config.num_classes,)}
    return state | {n: torch.randn(s, generator=draw) * 0.1 for n, s in branch.items() if config.num_classes}


def mmcdfsl_pretrain(config: MAEConfig, prefix: str = "_forward_module.model.") -> State:
    """Stage 1 as MM-CDFSL saves it: the head is head_action."""
    state = videomae_pretrain(config)
    return {prefix + (n.replace("head.", "head_action.") if n.startswith("head.") else n): t for n, t in state.items()}


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


def hf_pretrain(state: State, biases: str = "4.57") -> State:
    """A pre-training state of MCG-NJU in the names of VideoMAEForPreTraining."""
    encoder = {name.removeprefix("encoder."): t for name, t in state.items() if name.startswith("encoder.")}
    blocks = {name.removeprefix("decoder."): t for name, t in state.items() if name.startswith("decoder.blocks.")}
    inner = {
        n.replace("encoder.layer", "decoder.decoder_layers"): t for n, t in hf_videomae(blocks, biases, "").items()
    }
    rest = {n: t for n, t in state.items() if not n.startswith(("encoder.", "decoder.blocks."))}
    return hf_videomae(encoder, biases) | inner | rest


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
        **(_hf_decoder(config) if isinstance(config, MAEConfig) else {}),
        **changes,
    }


def _hf_decoder(config: MAEConfig) -> dict[str, Any]:
    return {
        "use_mean_pooling": False,
        "decoder_hidden_size": config.decoder_embed_dim,
        "decoder_num_hidden_layers": config.decoder_depth,
        "decoder_num_attention_heads": config.decoder_num_heads,
        "decoder_intermediate_size": config.decoder.mlp_dim,
        "norm_pix_loss": True,
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


def loaded_mae(source: Any, **overrides: Any) -> tuple[MAEConfig, State, Any]:
    """Config, state dict and report of a pre-training checkpoint of tiny_mae_config's geometry."""
    model, report = load_pretrained_mae(source, **{**MAE_GEOMETRY, **overrides})
    return model.config, dict(model.state_dict()), report
