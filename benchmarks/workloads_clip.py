"""Operations and bytes, as workloads.py counts them, of the models on a CLIP: M2-CLIP's step and EVL's."""

from dataclasses import replace
from typing import TYPE_CHECKING

from workloads import (
    FROZEN,
    THROUGH,
    TRAINED,
    Grad,
    Op,
    Rules,
    attention,
    attention_half,
    encoder,
    linear,
    mlp_half,
    norm,
    optimizer,
    repeat,
)

if TYPE_CHECKING:
    from mmfast.clip_config import CLIPConfig
    from mmfast.evl_config import EVLConfig
    from mmfast.m2clip_config import M2CLIPConfig


def stencil(stage: str, rows: int, width: int, taps: int, rules: Rules, grad: Grad) -> Op:
    """A depthwise convolution over `taps` neighbours; its backward is two like it."""
    size = rows * width
    moved = 2 + 3 * (grad.dx or grad.dw)
    flops = 2 * taps * size * (1 + grad.dx + grad.dw)
    return Op(stage, "stencil", flops, moved * size * rules.item, moved * size * rules.item, 0, 1, 0)


def ted_adapter(
    stage: str, frames: int, cells: int, extra: int, dim: int, hidden: int, rules: Rules, grad: Grad = TRAINED
) -> list[Op]:
    """x + W2 conv_time(W1 x) + W4 conv_space(W3 (x_t - x_(t-1))).   extra: class tokens of a frame."""
    every, spatial = frames * (cells + extra), frames * cells
    wide = {"every": every, "spatial": spatial}
    ops: list[Op] = []
    for part, taps in (("every", 3), ("spatial", 9)):
        rows = wide[part]
        ops.append(linear(stage, "adapter", rows, dim, hidden, rules, grad))
        ops.append(stencil(stage, rows, hidden, taps, rules, TRAINED))
        ops.append(linear(stage, "adapter", rows, hidden, dim, rules, TRAINED, residual=part == "every"))
    return ops


def text_adapter(stage: str, rows: int, dim: int, hidden: int, rules: Rules, grad: Grad = TRAINED) -> list[Op]:
    return [
        linear(stage, "adapter", rows, dim, hidden, rules, grad, gelu=True),
        linear(stage, "adapter", rows, hidden, dim, rules, TRAINED, residual=True),
    ]


class _Stream:
    """The residual stream of a frozen tower: gradients go as far down as the first adapter."""

    def __init__(self) -> None:
        self.flowing = False

    @property
    def frozen(self) -> Grad:
        return THROUGH if self.flowing else FROZEN

    def adapter(self) -> Grad:
        grad = Grad(self.flowing, True)
        self.flowing = True
        return grad


def _vision(config: "M2CLIPConfig", clips: int, rules: Rules) -> list[Op]:
    c, stage, place = config.clip, "vision", config.placement("vision")
    D, cells, frames, stream = c.vision_width, c.side**2, clips * config.num_frames, _Stream()
    tokens = frames * (1 + cells)
    ops = [linear(stage, "embed", frames * cells, 3 * c.patch_size**2, D, rules, pixels=True)]
    ops.append(norm(stage, tokens, D, rules))
    for i in range(c.vision_depth):
        before = place.before if place is not None and i in (place.layers or ()) else ()
        # Of the last block only the class tokens are read, unless an adapter over frames stands before its MLP.
        last = rules.rows_only and i == c.vision_depth - 1 and "mlp" not in before
        for half in ("attn", "mlp"):
            if half in before:
                hidden = config.vision_hidden
                ops += ted_adapter(stage, frames, cells, 1, D, hidden, rules, stream.adapter())
            if half == "attn":
                rows = 1 if last else None
                ops += attention_half(stage, frames, 1 + cells, D, rules, stream.frozen, rows=rows)
            else:
                ops += mlp_half(stage, frames if last else tokens, D, c.hidden("vision"), rules, stream.frozen)
    E, inner = c.embed_dim, max(c.embed_dim // 2, 1)
    ops.append(norm(stage, frames, D, rules, stream.frozen))
    ops.append(linear("heads", "project", frames, D, E, rules, stream.frozen))
    ops.append(linear("heads", "adapter", frames, E, inner, rules, stream.adapter()))
    ops.append(stencil("heads", frames, inner, 3, rules, TRAINED))
    ops.append(linear("heads", "adapter", frames, inner, E, rules, TRAINED, residual=True))
    classes = Grad(bool(place and place.layers), True)
    return [*ops, linear("heads", "class head", clips, D, config.num_classes, rules, classes)]


def _text(config: "M2CLIPConfig", texts: int, length: int, stream: _Stream, rules: Rules) -> list[Op]:
    c, stage, place = config.clip, "text", config.placement("text")
    W, tokens = c.text_width, texts * length
    ops: list[Op] = []
    for i in range(c.text_depth):
        before = place.before if place is not None and i in (place.layers or ()) else ()
        for half in ("attn", "mlp"):
            if half in before:
                ops += text_adapter(stage, tokens, W, config.text_hidden, rules, stream.adapter())
            if half == "attn":
                ops += attention_half(stage, texts, length, W, rules, stream.frozen, causal=True)
            else:
                ops += mlp_half(stage, tokens, W, c.hidden("text"), rules, stream.frozen)
    ops.append(norm(stage, texts, W, rules, stream.frozen))
    return [*ops, linear("heads", "project", texts, W, c.embed_dim, rules, stream.frozen)]


def _words(config: "M2CLIPConfig", clips: int, words: int, stream: _Stream, rules: Rules) -> list[Op]:
    """The block that tells `words` masked words of each clip from its frames, and their head."""
    c, stage, place = config.clip, "words", config.placement("text")
    W, rows, frames = c.text_width, clips * words, clips * config.num_frames
    before = place.before if place is not None and c.text_depth in (place.layers or ()) else ()
    ops: list[Op] = []
    if "attn" in before:
        ops += text_adapter(stage, rows, W, config.text_hidden, rules, stream.adapter())
    ops += [norm(stage, rows, W, rules, stream.frozen), norm(stage, frames, W, rules, THROUGH)]
    ops.append(linear(stage, "qkv", rows, W, W, rules, stream.frozen))
    ops.append(linear(stage, "qkv", frames, W, 2 * W, rules, THROUGH))
    ops.append(attention(stage, clips, words, config.num_frames, W, rules, THROUGH))
    stream.flowing = True
    ops.append(linear(stage, "proj", rows, W, W, rules, THROUGH, residual=True))
    if "mlp" in before:
        ops += text_adapter(stage, rows, W, config.text_hidden, rules, stream.adapter())
    ops += mlp_half(stage, rows, W, c.hidden("text"), rules, THROUGH)
    ops += [norm(stage, rows, W, rules, THROUGH), norm(stage, rows, W, rules, TRAINED)]
    ops.append(linear(stage, "word head", rows, W, W, rules, TRAINED, gelu=True))
    return [*ops, linear(stage, "word head", rows, W, config.num_words, rules, TRAINED)]


def m2clip(
    config: "M2CLIPConfig", clips: int, texts: int, length: int, words: int = 0, rules: Rules | None = None
) -> list[Op]:
    """A step of M2-CLIP: both towers, four losses, backward into what trains, optimiser.

    texts: how many are encoded, captions and class prompts. length: tokens of each. words: masked ones of each caption.
    """
    rules = rules or Rules()
    stream = _Stream()
    ops = _vision(config, clips, rules) + _text(config, texts, length, stream, rules)
    E, both = config.clip.embed_dim, Grad(True, stream.flowing)
    for other in (clips, config.num_classes):
        product = linear("losses", "similarity", clips, E, other, rules, both)
        ops.append(replace(product, trained=0))  # of two features, no weight
    if words and config.num_words:
        ops += _words(config, clips, words, stream, rules)
    return [*ops, optimizer(ops, rules)]


def clip_frames(config: "CLIPConfig", frames: int, rules: Rules, stage: str = "backbone") -> list[Op]:
    """Every token of CLIP's frozen vision tower."""
    D, n = config.vision_width, 1 + config.side**2
    ops = [linear(stage, "embed", frames * (n - 1), 3 * config.patch_size**2, D, rules, pixels=True)]
    ops.append(norm(stage, frames * n, D, rules))
    one = attention_half(stage, frames, n, D, rules) + mlp_half(stage, frames * n, D, config.hidden("vision"), rules)
    return ops + repeat(one, config.vision_depth)


def _query_attention(config: "EVLConfig", views: int, length: int, rules: Rules, folded: bool) -> list[Op]:
    """One query of each view over `length` tokens, its keys and values folded into it or written out."""
    D, inner, heads, stage = config.width, config.decoder_dim, config.decoder_num_heads, "decoder"
    ops = [linear(stage, "query", views, D, inner, rules, TRAINED)]
    if folded:
        ops += repeat([linear(stage, "query", views, inner, D, rules, TRAINED)], 2)
        product = 2 * views * heads * length * D
        read = (
            views * length * D * rules.item
        )  # forward reads the tokens, backward reads them and writes their gradient
        ops.append(Op(stage, "query attention", 2 * 3 * product, 3 * read, 6 * read, D))
    else:
        ops += repeat([linear(stage, "keys, values", views * length, D, inner, rules, TRAINED)], 2)
        product = 2 * views * length * inner
        moved = 5 * views * length * inner * rules.item  # keys and values read; again, and their gradients written
        ops.append(Op(stage, "query attention", 2 * 3 * product, moved, moved, inner))
    return [*ops, linear(stage, "query", views, inner, D, rules, TRAINED, residual=True)]


def _temporal(config: "EVLConfig", views: int, cells: int, extra: int, rules: Rules) -> list[Op]:
    """What the temporal modules add to the features of a block, whose gradient ends in their weights."""
    D, frames, stage = config.width, config.num_frames, "decoder"
    rows = views * frames * (cells + extra)
    ops = []
    if config.temporal_conv:
        ops.append(stencil(stage, rows, D, 3, rules, Grad(False, True)))
    if config.temporal_cross_attention:
        product = 2 * views * 2 * (frames - 1) * cells * cells * D  # both neighbours
        moved = 3 * views * frames * cells * D * rules.item
        count = 2 + 1 + rules.recompute_scores
        ops.append(Op(stage, "temporal", count * product, 2 * moved, 2 * moved, D))
    return ops


def evl(
    config: "EVLConfig",
    clips: int = 1,
    cells: int | None = None,
    *,
    folded: bool = True,
    rules: Rules | None = None,
) -> list[Op]:
    """A step of EVL: the frozen backbone forward, the decoder forward and backward, optimiser.

    cells: kept of each frame, all unless given. folded: without keys and values of all tokens in memory, as mmfast does.
    """
    from mmfast.clip_config import CLIPConfig

    rules = rules or Rules()
    backbone, frames = config.backbone, config.num_frames
    extra = int(isinstance(backbone, CLIPConfig))
    grid = config.grid[0] * config.grid[1]
    cells = grid if cells is None else cells
    if isinstance(backbone, CLIPConfig):
        if cells != grid:
            raise ValueError(f"cells must be {grid}, all of a frame, for a CLIP backbone, got {cells}")
        ops = clip_frames(backbone, clips * frames, rules)
    else:
        ops = encoder(backbone, "backbone", clips, frames * cells, rules)
    D, length = config.width, frames * (cells + extra)
    layer = _temporal(config, clips, cells, extra, rules)
    layer += [
        norm("decoder", clips * length, D, rules, TRAINED, residual=False),
        norm("decoder", clips, D, rules, TRAINED),
    ]
    layer += _query_attention(config, clips, length, rules, folded)
    layer += mlp_half("decoder", clips, D, config.decoder_mlp_dim, rules, TRAINED)
    ops += repeat(layer, config.num_layers)
    ops.append(norm("decoder", clips, D, rules, TRAINED, residual=False))
    ops.append(linear("decoder", "head", clips, D, config.num_classes, rules, TRAINED))
    return [*ops, optimizer(ops, rules)]
