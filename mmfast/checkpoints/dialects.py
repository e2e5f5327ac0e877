"""From any file of a known dialect to a config and tensors in canonical names, and an account of the rest."""

import math
import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import ViTConfig
from .container import Source, StateDict, read
from .hf_videomae import HF_VIDEOMAE
from .layout import Dialect, fit, read_config, set_qkv_bias
from .mmcdfsl import MMCDFSL
from .native import NATIVE
from .videomae import FINETUNE, PRETRAIN

# The first that takes a file has it: mmcdfsl is a videomae model with more.
DIALECTS: list[Dialect] = [NATIVE, MMCDFSL, HF_VIDEOMAE, PRETRAIN, FINETUNE]


@dataclass(frozen=True)
class Converted:
    """A checkpoint as MaskedViT takes it. `state` shares no memory with the file or the state dict it came from."""

    config: ViTConfig
    state: dict[str, Tensor]
    initialised: list[str]  # in the model, not in the file
    dropped: list[str]  # in the file, by its own names, not in the model
    notes: list[str]
    dialect: str


def convert(
    source: str | os.PathLike[str] | StateDict | Source,
    *,
    trust: bool = False,
    branch: str | None = None,
    head: str | None = None,
    **overrides: Any,
) -> Converted:
    """Read a checkpoint of any dialect. The dialect is found from the names of its tensors.

    trust: run the code a pickle asks for.
    branch, head: of MM-CDFSL, such as "student_rgb" or "teacher_flow"; "action", "verb" or "noun".
    overrides: fields of ViTConfig, None as if not given. One that changes the head, the patch embedding, a norm, the
    biases or the depth drops the file's tensors or leaves the model's to be initialised, and the result says so.

    Raises ValueError for a file that cannot be read, is of no known dialect, lacks a tensor, holds one that would
    change what the model computes, or holds NaN or infinity.
    """
    loaded = source if isinstance(source, Source) else read(source, trust=trust)
    dialect = _recognise(loaded)
    if not dialect.choices and (branch is not None or head is not None):
        raise ValueError(f"branch and head are for MM-CDFSL checkpoints, {loaded.where} is {dialect.name}")
    if loaded.config is not None and dialect not in (NATIVE, HF_VIDEOMAE):
        loaded.notes.append("config.json is of another project and was not read")
    asked = {name: value for name, value in overrides.items() if value is not None}
    draft = dialect.convert(loaded, branch, head)
    config = read_config(draft, asked, loaded.where)
    _check_values(draft.state, loaded.where)
    _warn_of_lost_biases(draft.state, draft.notes, loaded.where, warn=dialect is not NATIVE)
    set_qkv_bias(draft.state, config.qkv_bias)
    if config.qkv_bias != "full":
        draft.dropped += draft.key_biases
    initialised, dropped = fit(draft, config, set(asked), loaded.where)
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in draft.state.values()} - {"float32"})
    if dtypes:
        draft.notes.append(f"stored as {' and '.join(dtypes)}")
    state = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in draft.state.items()}
    written = loaded.written_as(draft.dropped + dropped)
    return Converted(config, state, initialised, written, loaded.notes + draft.notes, dialect.name)


def _recognise(source: Source) -> Dialect:
    reasons = []
    for dialect in DIALECTS:
        reason = dialect.why_not(source)
        if reason is None:
            return dialect
        reasons.append(f"\n  {dialect.name}: {reason}")
    names = ", ".join(list(source.tensors)[:4])
    raise ValueError(
        f"{source.where}: of no known dialect; its {len(source.tensors)} tensors begin {names}{''.join(reasons)}"
    )


def _check_values(state: dict[str, Tensor], where: str) -> None:
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{where}: {name} must be floating point, got {tensor.dtype}")
    # NaN and infinity carry through a sum, which is many times faster to take; a sum may overflow, so it only acquits.
    suspects = [name for name, tensor in state.items() if not math.isfinite(tensor.sum(dtype=torch.float32).item())]
    bad = [name for name in suspects if not bool(torch.isfinite(state[name]).all())]
    if bad:
        shown = ", ".join(bad[:3]) + (", ..." if len(bad) > 3 else "")
        raise ValueError(f"{where}: {len(bad)} of {len(state)} tensors hold NaN or infinity: {shown}")


def _warn_of_lost_biases(state: dict[str, Tensor], notes: list[str], where: str, warn: bool) -> None:
    biases = [t for name, t in state.items() if name.endswith((".attn.q_bias", ".attn.v_bias"))]
    for name, tensor in state.items():
        if name.endswith(".attn.qkv.bias"):
            biases += tensor.chunk(3)[::2]
    if not biases:
        notes.append('no query and value biases in the file: qkv_bias "none"')
    elif not any(bool(bias.any()) for bias in biases):
        message = (
            "every query and value bias is 0. Some versions of transformers 5 load VideoMAE's as zeros: "
            "if this file was saved by one, convert the original file instead"
        )
        notes.append(message)
        if warn:
            warnings.warn(f"{where}: {message}", stacklevel=3)
