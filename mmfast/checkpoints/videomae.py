"""VideoMAE and VideoMAE v2 as MCG-NJU and OpenGVLab release them: fine-tuned models and pre-training models.

Fine-tuned names are mmfast's own, up to a prefix. Pre-training adds `encoder.` and a decoder. A MaskedAutoencoder's own
state dict reads as one, with its class branch.
"""

from .container import Source
from .layout import CLASSIFIER, DECODER, PATCH_EMBED, Dialect, Draft, draft_of

_PREFIXES = ("backbone.", "encoder.", "model.")


def strip(names: list[str], prefixes: tuple[str, ...]) -> dict[str, str]:
    """Name -> name without any of the prefixes, in any order and number."""
    short = {}
    for name in names:
        rest = name
        while found := next((p for p in prefixes if rest.startswith(p)), None):
            rest = rest.removeprefix(found)
        short[name] = rest
    return short


def _why_not_encoder(names: list[str]) -> str | None:
    for wanted in (PATCH_EMBED[0], "blocks.0.attn.qkv.weight"):
        if not any(name == wanted or name.endswith(f".{wanted}") for name in names):
            return f"no {wanted}"
    return None


def _is_pretraining(names: list[str]) -> bool:
    return any(name.startswith(DECODER) for name in strip(names, ("model.",)).values())


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
    parts = (*DECODER, *CLASSIFIER) if "head.weight" in short.values() else DECODER
    taken = {n: s.removeprefix("encoder.") for n, s in short.items() if s.startswith(("encoder.", *parts))}
    if table := next((n for n, s in short.items() if s == "pos_embed"), None):
        taken[table] = "decoder.pos_embed"
    draft = draft_of(source, taken)
    draft.dropped += [name for name in short if name not in taken]
    return draft


FINETUNE = Dialect("videomae_finetune", _why_not_finetune, _convert_finetune)
PRETRAIN = Dialect("videomae_pretrain", _why_not_pretrain, _convert_pretrain)
