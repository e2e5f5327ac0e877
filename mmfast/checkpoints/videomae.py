"""VideoMAE and VideoMAE v2 as MCG-NJU and OpenGVLab release them: fine-tuned models and pre-training models.

Fine-tuned names are mmfast's own, up to a prefix. Pre-training adds `encoder.` and a decoder, which is left out here.
"""

import torch
from torch import Tensor

from ..layers import sinusoid_positions
from .container import Source
from .layout import PATCH_EMBED, Dialect, Draft, renamed

_PREFIXES = ("backbone.", "encoder.", "model.")
_DECODER = ("decoder.", "mask_token", "encoder_to_decoder.")


def strip(names: list[str], prefixes: tuple[str, ...]) -> dict[str, str]:
    """Name -> name without any of the prefixes, in any order and number."""
    short = {}
    for name in names:
        rest = name
        while found := next((p for p in prefixes if rest.startswith(p)), None):
            rest = rest.removeprefix(found)
        short[name] = rest
    return short


def draft_of(source: Source, names: dict[str, str]) -> Draft:
    """The draft of the tensors under their canonical names (`names`: name in the file -> canonical)."""
    origin: dict[str, str] = {}
    for name, short in names.items():
        if short in origin:
            raise ValueError(f"{source.where}: {origin[short]} and {name} are both {short}")
        origin[short] = name
    draft = renamed({short: source.tensors[name] for short, name in origin.items()}, origin)
    _drop_positions(draft, source.where)
    scaled = [name for name in draft.state if name.endswith(".attn.scale")]
    if scaled:
        raise ValueError(
            f"{source.where}: holds {origin[scaled[0]]}: cosine attention (cos_attn=True) is not supported"
        )
    return draft


def _drop_positions(draft: Draft, where: str) -> None:
    table = draft.state.get("pos_embed")
    if table is None:
        return
    if table.ndim != 3 or not _is_sinusoid(table[0]):
        raise ValueError(f"{where}: pos_embed {tuple(table.shape)} is learned; MaskedViT has fixed sinusoid positions")
    del draft.state["pos_embed"]
    draft.dropped.append(draft.origin["pos_embed"])
    draft.notes.append("pos_embed is the sinusoid table, which MaskedViT computes")


def _is_sinusoid(table: Tensor) -> bool:
    return torch.allclose(
        table.float(), sinusoid_positions(*table.shape), atol=1e-2 if table.dtype.itemsize < 4 else 1e-5
    )


def _why_not_encoder(names: list[str]) -> str | None:
    for wanted in (PATCH_EMBED[0], "blocks.0.attn.qkv.weight"):
        if not any(name == wanted or name.endswith(f".{wanted}") for name in names):
            return f"no {wanted}"
    return None


def _is_pretraining(names: list[str]) -> bool:
    return any(name.startswith(_DECODER) for name in strip(names, ("model.",)).values())


def _why_not_finetune(source: Source) -> str | None:
    names = list(source.tensors)
    if reason := _why_not_encoder(names):
        return reason
    if _is_pretraining(names):
        return "has a decoder"
    if PATCH_EMBED[0] not in strip(names, _PREFIXES).values():
        other = next(name for name in names if name.endswith(PATCH_EMBED[0])).removesuffix(PATCH_EMBED[0])
        return f"the prefix {other!r} is none of {', '.join(_PREFIXES)}"
    return None


def _convert_finetune(source: Source, branch: str | None, head: str | None) -> Draft:
    draft = draft_of(source, strip(list(source.tensors), _PREFIXES))
    if "head.weight" in draft.state and "fc_norm.weight" not in draft.state:
        draft.fields["pool"] = "first"
        draft.notes.append("no fc_norm: the head reads the first token, as VideoMAE does without mean pooling")
    return draft


def _why_not_pretrain(source: Source) -> str | None:
    names = list(source.tensors)
    if reason := _why_not_encoder(names):
        return reason
    if not _is_pretraining(names):
        return "no decoder, mask_token or encoder_to_decoder"
    if f"encoder.{PATCH_EMBED[0]}" not in strip(names, ("model.",)).values():
        return f"no encoder.{PATCH_EMBED[0]}"
    return None


def _convert_pretrain(source: Source, branch: str | None, head: str | None) -> Draft:
    short = strip(list(source.tensors), ("model.",))
    encoder = {n: s.removeprefix("encoder.") for n, s in short.items() if s.startswith("encoder.")}
    draft = draft_of(source, encoder)
    draft.dropped += [name for name in short if name not in encoder]
    draft.notes.append("a pre-training model: only its encoder is taken")
    return draft


FINETUNE = Dialect("videomae_finetune", _why_not_finetune, _convert_finetune)
PRETRAIN = Dialect("videomae_pretrain", _why_not_pretrain, _convert_pretrain)
