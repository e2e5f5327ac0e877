"""MM-CDFSL (ECCV 2024): stage 1, pre-training with a classifier, and stage 2, distillation into an RGB student.

Its encoder norm is kept, and fc_norm reads the mean of the normed tokens. The published loader keeps only the encoder;
here fc_norm and the head are kept too, and the decoder of stage 1. Stage 1 computes with eps 1e-6, stage 2 with torch's
default of 1e-5.
"""

import re

from .container import Source
from .layout import DECODER, PATCH_EMBED, Dialect, Draft, draft_of

_BRANCH = re.compile(r"(model|student_\w+|teacher_\w+)\.(.+)")
_HEADS = ("action", "verb", "noun")


def _branches(source: Source) -> dict[str, dict[str, str]]:
    """Branch -> (name in the file -> name in the branch); "model" is the branch without any prefix."""
    found: dict[str, dict[str, str]] = {}
    for name in source.tensors:
        match = _BRANCH.fullmatch(name)
        branch, short = (match[1], match[2]) if match else ("model", name)
        found.setdefault(branch, {})[name] = short
    return {b: names for b, names in found.items() if f"encoder.{PATCH_EMBED[0]}" in names.values()}


def _is_classifier(names: dict[str, str]) -> bool:
    return any(f"head_{head}.weight" in names.values() for head in _HEADS)


def _why_not(source: Source) -> str | None:
    branches = _branches(source)
    if not branches:
        return f"no encoder.{PATCH_EMBED[0]}, be it of a model, a student or a teacher"
    if set(branches) == {"model"} and not _is_classifier(branches["model"]):
        return "neither student nor head_action, head_verb or head_noun"
    return None


def _convert(source: Source, branch: str | None, head: str | None) -> Draft:
    branches = _branches(source)
    if branch is None:
        branch = next(b for b in ("student_rgb", "model", *branches) if b in branches)
    if branch not in branches:
        raise ValueError(f"{source.where}: branch must be one of {', '.join(sorted(branches))}, got {branch!r}")
    names = branches[branch]
    heads = [h for h in _HEADS if f"head_{h}.weight" in names.values()]
    if head is not None and head not in heads:
        raise ValueError(f"{source.where}: head must be one of {', '.join(heads) or 'none'}, got {head!r}")
    chosen = head or next(iter(heads), None)
    canonical = {}
    for name, short in names.items():
        if short.startswith("encoder."):
            canonical[name] = short.removeprefix("encoder.")
        elif short.startswith(("fc_norm.", *DECODER)):
            canonical[name] = short
        elif chosen and short.startswith(f"head_{chosen}."):
            canonical[name] = short.replace(f"head_{chosen}.", "head.")
    draft = draft_of(source, canonical)
    draft.dropped += [name for name in source.tensors if name not in canonical]
    stage = 1 if draft.has_decoder else 2
    draft.fields["norm_eps"] = 1e-6 if stage == 1 else 1e-5
    draft.mae_fields["head_drop_rate"] = 0.5  # what stage 1 trains with
    draft.notes.append(f"stage {stage}, branch {branch}, head {chosen}, norm_eps {draft.fields['norm_eps']:g}")
    return draft


MMCDFSL = Dialect("mmcdfsl", _why_not, _convert, choices=True)
