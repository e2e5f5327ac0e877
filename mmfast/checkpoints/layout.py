"""The canonical layout: the tensor names and shapes of MaskedViT and MaskedAutoencoder.

The names are those of VideoMAE's fine-tuned models (MCG-NJU), and of its pre-training models for the decoder. A dialect only
renames into them: `encoder.`, which a MaskedAutoencoder has before its encoder's names, comes last (`model_name`).
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..config import MAEConfig, ViTConfig
from .container import Source

PATCH_EMBED = ("patch_embed.proj.weight", "patch_embed.proj.bias")
DECODER_HEAD = ("decoder.head.weight", "decoder.head.bias")
CLASSIFIER = ("fc_norm.", "head.")
DECODER = ("decoder.", "encoder_to_decoder.", "mask_token")
BLOCK = re.compile(r"(decoder\.)?blocks\.(\d+)\.(.+)")
_ENCODER = ("patch_embed.", "blocks.", "norm.")
# Names a dialect hands to `fit`, which refuses those the model has no place for: they change what it computes.
_OF_THE_MODEL = re.compile(
    r"(patch_embed|blocks|norm|fc_norm|head|decoder|encoder_to_decoder)\..+|norm_pre\..+|cls_token|pos_embed"
    r"|temporal_embed|mask_token"
)


@dataclass
class Draft:
    """A file in canonical names, before any override: what a dialect's `convert` returns."""

    state: dict[str, Tensor]
    origin: dict[str, tuple[str, ...]]  # canonical name -> names in Source.tensors
    fields: dict[str, Any] = field(default_factory=dict)  # config fields the dialect knows; shapes tell the others
    mae_fields: dict[str, Any] = field(default_factory=dict)  # the same, for a MaskedAutoencoder alone
    dropped: list[str] = field(default_factory=list)  # in the names of Source.tensors
    notes: list[str] = field(default_factory=list)
    key_biases: list[str] = field(default_factory=list)  # names in Source.tensors, left out unless qkv_bias is "full"

    @property
    def has_decoder(self) -> bool:
        return any(name.startswith(DECODER) for name in self.state)

    def written_as(self, name: str) -> str:
        """A canonical name as the file has it, for messages."""
        return ", ".join(self.origin.get(name, (name,)))

    def leave_out(self, names: Iterable[str]) -> None:
        """Drop tensors by their canonical names; those that are not there are passed over."""
        for name in names:
            if self.state.pop(name, None) is not None:
                self.dropped += self.origin.get(name, (name,))


@dataclass(frozen=True)
class Dialect:
    """One naming of checkpoints: `why_not` tells why a file is none of it, `convert` renames one that is."""

    name: str
    why_not: Callable[[Source], str | None]
    convert: Callable[[Source, str | None, str | None], Draft]  # source, branch, head
    choices: bool = False  # whether branch and head mean something


def draft_of(source: Source, names: dict[str, str]) -> Draft:
    """The draft of tensors under canonical names (`names`: name in the file -> canonical).

    What no model here has is left out. Raises ValueError for two tensors of one name.
    """
    origin: dict[str, tuple[str, ...]] = {}
    for name, short in names.items():
        if short in origin:
            raise ValueError(f"{source.where}: {origin[short][0]} and {name} are both {short}")
        origin[short] = (name,)
    state = {short: source.tensors[name] for name, short in names.items() if _OF_THE_MODEL.fullmatch(short)}
    return Draft(state, origin, dropped=[name for name, short in names.items() if short not in state])


def model_name(name: str, config: ViTConfig) -> str:
    """A canonical name in the state dict of the model of this config."""
    return f"encoder.{name}" if isinstance(config, MAEConfig) and name.startswith(_ENCODER) else name


def canonical_shapes(config: ViTConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor in MaskedViT(config), or in MaskedAutoencoder(config) for a MAEConfig.

    They are the names of MaskedViT's state dict; `model_name` makes those of MaskedAutoencoder's.
    """
    if not isinstance(config, MAEConfig):
        return _shapes_of_vit(config)
    classes = config.num_classes > 0
    encoder = {n: s for n, s in _shapes_of_vit(config).items() if classes or not n.startswith(CLASSIFIER)}
    inner = {f"decoder.{n}": s for n, s in _shapes_of_vit(config.decoder).items() if n not in PATCH_EMBED}
    width = config.decoder_embed_dim
    return {
        **encoder,
        "encoder_to_decoder.weight": (width, config.embed_dim),
        "mask_token": (1, 1, width),
        **inner,
        DECODER_HEAD[0]: (config.patch_dim, width),
        DECODER_HEAD[1]: (config.patch_dim,),
    }


def _shapes_of_vit(config: ViTConfig) -> dict[str, tuple[int, ...]]:
    dim, hidden = config.embed_dim, config.mlp_dim
    pair = lambda name, rows: {f"{name}.weight": (rows,), f"{name}.bias": (rows,)}
    linear = lambda name, rows, cols: {f"{name}.weight": (rows, cols), f"{name}.bias": (rows,)}
    patch = (config.in_chans, config.tubelet_size, config.patch_size, config.patch_size)
    shapes: dict[str, tuple[int, ...]] = {PATCH_EMBED[0]: (dim, *patch), PATCH_EMBED[1]: (dim,)}
    for n in range(config.depth):
        block = f"blocks.{n}"
        shapes |= pair(f"{block}.norm1", dim)
        shapes[f"{block}.attn.qkv.weight"] = (3 * dim, dim)
        if config.qkv_bias == "full":
            shapes[f"{block}.attn.qkv.bias"] = (3 * dim,)
        if config.qkv_bias == "qv":
            shapes |= {f"{block}.attn.q_bias": (dim,), f"{block}.attn.v_bias": (dim,)}
        shapes |= linear(f"{block}.attn.proj", dim, dim) | pair(f"{block}.norm2", dim)
        shapes |= linear(f"{block}.mlp.fc1", hidden, dim) | linear(f"{block}.mlp.fc2", dim, hidden)
        if config.init_values > 0:
            shapes |= {f"{block}.gamma_1": (dim,), f"{block}.gamma_2": (dim,)}
        if config.adapter_hidden and (config.adapter_layers is None or n in config.adapter_layers):
            for half in config.adapter_before:
                shapes |= _shapes_of_adapter(f"{block}.adapter_pre_{half}.", dim, config.adapter_hidden)
    if config.final_norm:
        shapes |= pair("norm", dim)
    if config.fc_norm:
        shapes |= pair("fc_norm", dim)
    if config.num_classes:
        shapes |= linear("head", config.num_classes, dim)
    return shapes


def _shapes_of_adapter(prefix: str, dim: int, hidden: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for part, taps in ((prefix, (1, 3)), (f"{prefix}offset_adapter.", (1, 1, 3, 3))):
        shapes |= {f"{part}fc1.weight": (hidden, dim), f"{part}fc1.bias": (hidden,)}
        shapes |= {f"{part}conv.weight": (hidden, *taps), f"{part}conv.bias": (hidden,)}
        shapes |= {f"{part}fc2.weight": (dim, hidden), f"{part}fc2.bias": (dim,)}
    return shapes


def set_qkv_bias(state: dict[str, Tensor], want: str) -> None:
    """Rewrite the biases of every block from "full" to "qv" or back, exactly.

    A key bias adds one number to every score of a query, which softmax ignores: leaving it out changes nothing.
    """
    for name in [name for name in state if name.endswith(".attn.qkv.weight")]:
        qkv, q, v = (name.replace("qkv.weight", bias) for bias in ("qkv.bias", "q_bias", "v_bias"))
        if want == "qv" and qkv in state:
            state[q], _, state[v] = state.pop(qkv).chunk(3)
        elif want == "full" and q in state:
            state[qkv] = torch.cat([state[q], torch.zeros_like(state[q]), state[v]])
            del state[q], state[v]
