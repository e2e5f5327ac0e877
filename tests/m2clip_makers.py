"""A small M2CLIP with every parameter random, its published state dict, and batches for it."""

from typing import Any

import torch
from torch import Tensor

from mmfast.clip_config import CLIPConfig
from mmfast.m2clip import M2CLIP
from mmfast.m2clip_config import M2CLIPConfig

CLASSES, WORDS, FRAMES, CONTEXT, END = 5, 7, 3, 12, 39
TOWERS: dict[str, Any] = dict(
    embed_dim=32, image_size=32, patch_size=8, vision_width=48, vision_depth=3, vision_num_heads=3, context_length=CONTEXT,
    vocab_size=END + 1, text_width=32, text_depth=3, text_num_heads=2,
)  # fmt: skip
_OPENAI = (
    ("norm1.", "ln_1."),
    ("norm2.", "ln_2."),
    ("attn.qkv.", "attn.in_proj_"),
    ("attn.proj.", "attn.out_proj."),
    ("mlp.fc1.", "mlp.c_fc."),
    ("mlp.fc2.", "mlp.c_proj."),
)


def tiny_config(preset: str = "k400", **changes: Any) -> M2CLIPConfig:
    own = dict(num_classes=CLASSES, num_words=WORDS, num_frames=FRAMES, vision_hidden=10, text_hidden=9)
    return M2CLIPConfig.preset(preset, CLIPConfig(**TOWERS), **{**own, **changes})


def tiny_model(preset: str = "k400", seed: int = 0, **changes: Any) -> M2CLIP:
    """In eval mode, nothing at its initial zero, so that every adapter counts."""
    torch.manual_seed(seed)
    model = M2CLIP(tiny_config(preset, **changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapter" in name or "norm" in name or "ln_" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def published(model: M2CLIP) -> dict[str, Tensor]:
    """The state dict in M2-CLIP's names: OpenAI's for the towers, the adapters among them."""
    out = {}
    for name, tensor in model.state_dict().items():
        own = name.removeprefix("clip.")
        own = own.removeprefix("text.")
        if own.startswith(("t_adapter", "adapter_fc")):
            own = f"visual.{own}"
        if "adapter" not in own:
            for mine, theirs in _OPENAI:
                own = own.replace(mine, theirs)
        out[own] = tensor.detach().clone()
    return out


def texts(lengths: list[int], seed: int = 0) -> Tensor:
    """Token ids [L, CONTEXT]: a start, `length` words, the end."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.zeros(len(lengths), CONTEXT, dtype=torch.int64)
    for row, length in zip(rows, lengths, strict=True):
        row[0] = END - 1
        row[1 : 1 + length] = torch.randint(1, END - 1, (length,), generator=draw)
        row[1 + length] = END
    return rows


def batch(size: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """What M2CLIP.losses takes; captions of some clips have words masked."""
    draw = torch.Generator().manual_seed(seed + 1)
    class_ids = texts([2, 5, 3, 1, 10][:CLASSES], seed)
    labels = torch.tensor([1, 3, 1, 4, 0, 2, 4])[:size]
    ids = class_ids[labels].clone()
    mlm_labels = torch.full_like(ids, -100)
    for row, place in ((0, 2), (0, 4), (3, 1), (5, 3))[: 3 if size < 6 else 4]:
        if row < size:
            ids[row, place], mlm_labels[row, place] = 5, (row + place) % WORDS
    video = torch.randn(size, 3, FRAMES, 32, 32, generator=draw)
    return dict(video=video, token_ids=ids, labels=labels, class_token_ids=class_ids, mlm_labels=mlm_labels)
