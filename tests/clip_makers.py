"""Small CLIPs with random weights, their input, and state dicts in the names of every dialect."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from mmfast import CLIP, CLIPConfig

State = dict[str, Tensor]
TINY: dict[str, Any] = dict(
    embed_dim=40, image_size=48, patch_size=16, vision_width=64, vision_depth=3, vision_num_heads=2, context_length=13,
    vocab_size=100, text_width=32, text_depth=3, text_num_heads=2,
)  # fmt: skip
HEADS = dict(vision_num_heads=2, text_num_heads=2)
END = 99


def make(
    seed: int = 0, *, vision_adapters: Any = None, text_adapters: Any = None, extra: int = 0, **config: Any
) -> CLIP:
    """Every parameter is random, adapters too."""
    torch.manual_seed(seed)
    placed = dict(vision_adapters=vision_adapters, text_adapters=text_adapters, extra_text_blocks=extra)
    model = CLIP(CLIPConfig(**{**TINY, **config}), **placed).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def clips(batch: int = 2, frames: int = 4, size: tuple[int, int] = (48, 48), seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, frames, *size, generator=torch.Generator().manual_seed(seed))


def texts(ends: tuple[int, ...] = (3, 12, 5, 0, 7), context: int = 13, seed: int = 2) -> Tensor:
    """Token ids that end where told, with 0 behind."""
    ids = torch.randint(0, END, (len(ends), context), generator=torch.Generator().manual_seed(seed))
    for row, end in zip(ids, ends, strict=True):
        row[end], row[end + 1 :] = END, 0
    return ids


_BLOCK = {
    "norm1": "ln_1",
    "norm2": "ln_2",
    "attn.qkv.": "attn.in_proj_",
    "attn.proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def openai(state: State, text: str = "") -> State:
    """mmfast's names into OpenAI's; `text` stands before the text tower's."""
    out = {}
    for name, tensor in state.items():
        for new, old in _BLOCK.items():
            name = name.replace(f".{new}", f".{old}") if "resblocks" in name else name
        out[text + name.removeprefix("text.") if name.startswith("text.") else name] = tensor
    return out


def hf_model(config: CLIPConfig, **changes: Any) -> nn.Module:
    """transformers' CLIPModel of this config with random weights."""
    import transformers

    kind = {"hidden_act": {"quick": "quick_gelu", "erf": "gelu"}[config.gelu], **changes}
    theirs = transformers.CLIPConfig(
        text_config=dict(
            hidden_size=config.text_width, intermediate_size=config.hidden("text"), eos_token_id=END, bos_token_id=98,
            num_hidden_layers=config.text_depth, num_attention_heads=config.text_num_heads,
            vocab_size=config.vocab_size, max_position_embeddings=config.context_length, **kind,
        ),
        vision_config=dict(
            hidden_size=config.vision_width, intermediate_size=config.hidden("vision"), patch_size=config.patch_size,
            num_hidden_layers=config.vision_depth, num_attention_heads=config.vision_num_heads,
            image_size=config.image_size, **kind,
        ),
        projection_dim=config.embed_dim,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.CLIPModel(theirs).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def open_clip_folder(folder: Path, state: State, model: dict[str, Any], pixels: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    plain = {name: tensor.clone().contiguous() for name, tensor in state.items()}
    safetensors.torch.save_file(plain, folder / "open_clip_model.safetensors")
    about = {"model_cfg": model, "preprocess_cfg": pixels}
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    return folder


class Archived(nn.Module):
    """A tree of modules whose state dict is the one given, for torch.jit.save."""

    def __init__(self, state: State) -> None:
        super().__init__()
        for name, tensor in state.items():
            *path, last = name.split(".")
            at: nn.Module = self
            for part in path:
                if part not in at._modules:
                    at.add_module(part, nn.Module())
                at = at._modules[part]  # type: ignore[assignment]  # just added
            at.register_parameter(last, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))

    def forward(self, x: Tensor) -> Tensor:
        return x
