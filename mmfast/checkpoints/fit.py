"""Fitting a file's tensors to a config: what changes with the overrides, what is missing, what is left over."""

import re
from collections.abc import Callable

from ..config import MAEConfig, ViTConfig
from .layout import BLOCK, DECODER, DECODER_HEAD, PATCH_EMBED, Draft, canonical_shapes, model_name

_NORM = re.compile(r"norm\.(weight|bias)")
_FC_NORM = re.compile(r"fc_norm\.(weight|bias)")
_ANY_DECODER = re.compile(rf"({'|'.join(map(re.escape, DECODER))}).*")
_PIXELS = {"in_chans", "patch_size", "tubelet_size"}
# The overrides that may leave out a tensor of the file or make a new one.
_ASKED_BY = (
    (re.compile(r"(patch_embed\.proj|decoder\.head)\..+"), _PIXELS),
    (_NORM, {"final_norm"}),
    (_FC_NORM, {"fc_norm"}),
    (re.compile(r"head\.(weight|bias)"), {"num_classes"}),
    (re.compile(r"(decoder\.)?blocks\.\d+\.gamma_[12]"), {"init_values"}),
    (re.compile(r"(decoder\.)?blocks\.\d+\.attn\.(q_bias|v_bias|qkv\.bias)"), {"qkv_bias"}),
    (re.compile(r"blocks\.\d+\.adapter_pre_.+"), {"adapter_hidden", "adapter_before", "adapter_layers"}),
)


def fit(draft: Draft, config: ViTConfig, overridden: set[str], where: str) -> list[str]:
    """Leave in draft.state what the model of the config takes; gives the canonical names it must initialise.

    Only what an override asks for is initialised or left out, and all of a decoder the file has not. Any other tensor that
    is missing, of another shape or unknown raises ValueError, because the model would not compute what the file's did.
    """
    asked = _asked(draft, config, overridden)
    state, shapes = draft.state, canonical_shapes(config)
    if isinstance(config, MAEConfig) and "decoder_embed_dim" in overridden:
        _renew_decoder(draft, config.decoder_embed_dim)
    for pair in (PATCH_EMBED, ("head.weight", "head.bias")):
        if any(name in state and asked(name) and state[name].shape != shapes.get(name) for name in pair):
            _renew(draft, pair)
    kind = "MaskedAutoencoder" if isinstance(config, MAEConfig) else "MaskedViT"
    for name in list(state):
        if name not in shapes:
            if not asked(name) and not _above(name, config, overridden):
                raise ValueError(f"{where}: holds {draft.written_as(name)}, which {kind} has no place for")
            draft.leave_out([name])
        elif state[name].shape != shapes[name]:
            got = f"{draft.written_as(name)} has shape {tuple(state[name].shape)}"
            raise ValueError(f"{where}: {got}, but the config makes it {shapes[name]}")
    initialised = [name for name in shapes if name not in state]
    for name in initialised:
        if not asked(name):
            lacking, depth = model_name(name, config), config.depth
            if name.startswith(DECODER) and isinstance(config, MAEConfig):
                depth = config.decoder_depth
            raise ValueError(f"{where}: has no {lacking}, which a model of depth {depth} needs")
    return initialised


def _asked(draft: Draft, config: ViTConfig, overridden: set[str]) -> Callable[[str], bool]:
    """Whether a tensor may be left out or initialised."""
    allowed = [pattern for pattern, fields in _ASKED_BY if fields & overridden]
    if isinstance(config, MAEConfig):
        if "num_classes" in overridden:
            allowed.append(_FC_NORM)  # it comes and goes with the class branch
        if not draft.has_decoder:
            allowed += [_ANY_DECODER] + ([] if "norm.weight" in draft.state else [_NORM])
        elif "decoder_embed_dim" in overridden and _decoder_width(draft) != config.decoder_embed_dim:
            allowed.append(_ANY_DECODER)
    return lambda name: any(pattern.fullmatch(name) for pattern in allowed)


def _decoder_width(draft: Draft) -> int:
    return len(draft.state["encoder_to_decoder.weight"])


def _renew_decoder(draft: Draft, width: int) -> None:
    """Leave out a decoder of another width."""
    if draft.has_decoder and _decoder_width(draft) != width:
        draft.notes.append(f"decoder_embed_dim {_decoder_width(draft)} -> {width}: the decoder starts anew")
        draft.leave_out([name for name in draft.state if name.startswith(DECODER)])


def _renew(draft: Draft, pair: tuple[str, str]) -> None:
    """Leave out a weight and its bias; with the patch embedding what predicts its pixels, even if it is as large."""
    names = [name for name in (*pair, *DECODER_HEAD) if name in draft.state] if pair == PATCH_EMBED else pair
    if pair == PATCH_EMBED:
        what = "patch embedding and decoder.head start" if DECODER_HEAD[0] in names else "patch embedding starts"
        draft.notes.append(
            f"{what} anew for other pixels, all else is the file's: so a flow or pose model is made from an RGB file"
        )
    draft.leave_out(names)


def _above(name: str, config: ViTConfig, overridden: set[str]) -> bool:
    """Whether a tensor is of a block that a smaller depth leaves out."""
    block = BLOCK.match(name)
    if block is None:
        return False
    field = "decoder_depth" if block[1] else "depth"
    return field in overridden and int(block[2]) >= getattr(config, field)
