"""From any file of a known dialect to a config and tensors in canonical names, and an account of the rest."""

import math
import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import MAEConfig, ViTConfig
from .container import Source, StateDict, read
from .fit import fit
from .geometry import read_config
from .hf_videomae import HF_VIDEOMAE
from .layout import Dialect, Draft, model_name, set_qkv_bias
from .mmcdfsl import MMCDFSL
from .native import MODELS, NATIVE
from .parts import drop_positions, refuse_cosine_attention, take_autoencoder, take_encoder
from .videomae import FINETUNE, PRETRAIN

# The first that takes a file has it: mmcdfsl is a videomae model with more.
DIALECTS: list[Dialect] = [NATIVE, MMCDFSL, HF_VIDEOMAE, PRETRAIN, FINETUNE]


@dataclass(frozen=True)
class Converted:
    """A checkpoint as the model of its config takes it: a MaskedViT, or a MaskedAutoencoder for a MAEConfig.

    `state` shares no memory with the file or the state dict it came from.
    """

    config: ViTConfig
    state: dict[str, Tensor]
    initialised: list[str]  # in the model, not in the file
    dropped: list[str]  # in the file, by its own names, not in the model
    notes: list[str]
    dialect: str


def convert(
    source: str | os.PathLike[str] | StateDict | Source,
    *,
    model: str | None = "MaskedViT",
    trust: bool = False,
    branch: str | None = None,
    head: str | None = None,
    **overrides: Any,
) -> Converted:
    """Read a checkpoint of any dialect. The dialect is found from the names of its tensors.

    model: "MaskedViT", "MaskedAutoencoder", or None for the one the file holds: with a decoder, the latter.
    trust: run the code a pickle asks for.
    branch, head: of MM-CDFSL, such as "student_rgb" or "teacher_flow"; "action", "verb" or "noun".
    overrides: fields of ViTConfig or MAEConfig, None as if not given. One that changes the head, the patch embedding, a
    norm, the biases, the depth or the decoder's width drops the file's tensors or leaves the model's to be initialised,
    and the result says so. So does a MaskedAutoencoder from a file without a decoder.

    Raises ValueError for a file that cannot be read, is of no known dialect, lacks a tensor, holds one that would
    change what the model computes, or holds NaN or infinity.
    """
    if model is not None and model not in MODELS:
        raise ValueError(f"model must be {' or '.join(MODELS)} or None, got {model!r}")
    loaded = source if isinstance(source, Source) else read(source, trust=trust)
    dialect = _recognise(loaded)
    if not dialect.choices and (branch is not None or head is not None):
        raise ValueError(f"branch and head are for MM-CDFSL checkpoints, {loaded.where} is {dialect.name}")
    if loaded.config is not None and dialect not in (NATIVE, HF_VIDEOMAE):
        loaded.notes.append("config.json is of another project and was not read")
    asked = {name: value for name, value in overrides.items() if value is not None}
    draft = dialect.convert(loaded, branch, head)
    kind = MODELS[model or ("MaskedAutoencoder" if draft.has_decoder else "MaskedViT")]
    (take_autoencoder if kind is MAEConfig else take_encoder)(draft)
    refuse_cosine_attention(draft, loaded.where)
    drop_positions(draft, loaded.where)
    config = read_config(draft, kind, asked, loaded.where)
    check_values(draft.state, loaded.where)
    _warn_of_lost_biases(draft.state, draft.notes, loaded.where, warn=dialect is not NATIVE)
    set_qkv_bias(draft.state, config.qkv_bias)
    if config.qkv_bias != "full":
        _leave_out_key_biases(draft)
    initialised = [model_name(name, config) for name in fit(draft, config, set(asked), loaded.where)]
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in draft.state.values()} - {"float32"})
    if dtypes:
        draft.notes.append(f"stored as {' and '.join(dtypes)}")
    state = {
        model_name(name, config): tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in draft.state.items()
    }
    written = loaded.written_as(draft.dropped)
    return Converted(config, state, initialised, written, loaded.notes + draft.notes, dialect.name)


def _recognise(source: Source) -> Dialect:
    if any(name.startswith("loss_module.") for name in source.tensors):
        raise ValueError(
            f"{source.where}: is what a training run goes on from; the model it made is in the folder model beside "
            "its folder checkpoints"
        )
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


def check_values(state: dict[str, Tensor], where: str) -> None:
    """Raise unless every tensor is floating point and finite."""
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{where}: {name} must be floating point, got {tensor.dtype}")
    # NaN and infinity carry through a sum, which is many times faster to take; a sum may overflow, so it only acquits.
    suspects = [name for name, tensor in state.items() if not math.isfinite(tensor.sum(dtype=torch.float32).item())]
    bad = [name for name in suspects if not bool(torch.isfinite(state[name]).all())]
    if bad:
        shown = ", ".join(bad[:3]) + (", ..." if len(bad) > 3 else "")
        raise ValueError(f"{where}: {len(bad)} of {len(state)} tensors hold NaN or infinity: {shown}")


def _leave_out_key_biases(draft: Draft) -> None:
    lost = [name for name in draft.key_biases if name not in draft.dropped]
    if lost:
        draft.dropped += lost
        draft.notes.append(f"{len(lost)} key biases left out, exactly: softmax ignores them")


def _warn_of_lost_biases(state: dict[str, Tensor], notes: list[str], where: str, warn: bool) -> None:
    for stack in ("", "decoder."):
        weights = [name for name in state if name.startswith(f"{stack}blocks.") and name.endswith(".attn.qkv.weight")]
        if not weights:
            continue
        biases = [state[b] for w in weights for b in _query_and_value(w) if b in state]
        biases += [part for w in weights if (b := f"{w[:-6]}bias") in state for part in state[b].chunk(3)[::2]]
        of = f" of the {stack.rstrip('.')}" if stack else ""
        if not biases:
            notes.append(f'no query and value biases in the file{of}: qkv_bias "none"')
        elif not any(bool(bias.any()) for bias in biases):
            message = (
                f"every query and value bias{of} is 0. Some versions of transformers 5 load VideoMAE's as zeros: "
                "if this file was saved by one, convert the original file instead"
            )
            notes.append(message)
            if warn:
                warnings.warn(f"{where}: {message}", stacklevel=3)


def _query_and_value(weight: str) -> tuple[str, str]:
    return weight.replace("qkv.weight", "q_bias"), weight.replace("qkv.weight", "v_bias")
