"""What every configuration computes and moves: operations and bytes of each op of a forward pass or a training step.

A multiply and an add are two operations. Per token and layer, forward, at mlp_ratio r, in units of the width D:

    operations     QKV 6 D, projection 2 D, fc1 and fc2 4 r D, and 4 n for the two products of attention
    least bytes    LN 2, QKV 4, attention 4, projection and residual 3, LN 2, fc1 and GELU 1 + r, fc2 and residual r + 2
    unfused        the same, GELU and residuals as passes of their own: 3 + 3 for the sums, 2 r for GELU

"least" is one kernel an op: inputs read once, outputs written once, weights once a call. "unfused" is plain torch, one
pass a function, with flash attention. Vectors (biases, norms' weights, statistics) are left out: below 0.1 %.

Backward, of a Linear: one product for the input's gradient and one for the weight's, where they are needed at all; of
attention: four products of the forward's two, and with recomputed scores (flash attention) a fifth.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mmfast.config import MAEConfig, ViTConfig

POINTWISE = ("norm", "pool", "tokens", "loss", "stencil", "optimizer")  # no matrix product in them


@dataclass(frozen=True)
class Rules:
    """Bytes of an element, and which products count.

    item: of activations, and of weights as products read them. pixel: of the clip. master: of a weight's gradient and of
    the optimiser's numbers. recompute_scores: attention's backward computes them again. causal: a causal tower's scores
    above the diagonal do not count. rows_only: nothing is computed in a last block but what is read of it.
    """

    item: int = 2
    pixel: int = 1
    master: int = 4
    recompute_scores: bool = True
    causal: bool = True
    rows_only: bool = True


class Grad(NamedTuple):
    """Whether an op's input and its weight get a gradient."""

    dx: bool
    dw: bool


FROZEN, THROUGH, FIRST, TRAINED = Grad(False, False), Grad(True, False), Grad(False, True), Grad(True, True)


@dataclass(frozen=True)
class Op:
    """One op, forward and whatever backward it has, over all its calls.

    stage: the part of the model. kind: embed, norm, qkv, attention, proj, fc1, fc2, pool, head, ... inner: the depth of its
    product. trained: weights that get a gradient.
    """

    stage: str
    kind: str
    flops: int
    least: int
    unfused: int
    inner: int = 0
    calls: int = 1
    trained: int = 0

    def times(self, count: int) -> "Op":
        return replace(
            self,
            flops=self.flops * count,
            least=self.least * count,
            unfused=self.unfused * count,
            calls=self.calls * count,
            trained=self.trained * count,
        )

    def joined(self, other: "Op") -> "Op":
        """Both, as one op of this one's stage and kind."""
        return replace(
            self,
            flops=self.flops + other.flops,
            least=self.least + other.least,
            unfused=self.unfused + other.unfused,
            inner=max(self.inner, other.inner),
            calls=self.calls + other.calls,
            trained=self.trained + other.trained,
        )


def repeat(ops: Iterable[Op], count: int) -> list[Op]:
    return [op.times(count) for op in ops]


def flops_of(ops: Iterable[Op], *kinds: str) -> int:
    """Of matrix products, of these kinds or of all; convolutions over neighbours are not among them."""
    return sum(op.flops for op in ops if (op.kind in kinds if kinds else op.kind not in POINTWISE))


def merged(ops: Iterable[Op]) -> list[Op]:
    """One op for each stage and kind, in the order they come."""
    found: dict[tuple[str, str], Op] = {}
    for op in ops:
        old = found.get((op.stage, op.kind))
        found[op.stage, op.kind] = op if old is None else old.joined(op)
    return list(found.values())


def linear(
    stage: str,
    kind: str,
    rows: int,
    inner: int,
    wide: int,
    rules: Rules,
    grad: Grad = FROZEN,
    *,
    residual: bool = False,
    gelu: bool = False,
    pixels: bool = False,
) -> Op:
    """x [rows, inner] W^T [wide, inner], perhaps with GELU behind it or a residual added.   pixels: x is of the clip."""
    weight, out = inner * wide, rows * wide
    trained = bool(grad.dx or grad.dw)
    flops = 2 * rows * weight * (1 + grad.dx + grad.dw)
    source = rows * inner * (rules.pixel if pixels else rules.item)
    least = source + (out + weight + out * residual) * rules.item
    unfused = least + (2 * out * residual + 2 * out * gelu) * rules.item
    if pixels:  # cast and normalised in a pass of its own, positions added in another
        unfused += rows * inner * 2 * rules.item + 2 * out * rules.item
    if gelu and trained:
        least += out * rules.item  # what GELU was of, for the backward
    # Backward: the gradient of the output is read once by the fused op, and once by each product in plain torch.
    saved = rows * inner * (rules.pixel if pixels else rules.item)
    own = weight * rules.item * grad.dx + weight * rules.master * grad.dw
    moved = own + rows * inner * rules.item * grad.dx + saved * grad.dw
    if trained:
        least += moved + out * rules.item * (1 + gelu)
        unfused += moved + out * rules.item * (grad.dx + 2 * grad.dw + 3 * gelu)  # the bias's sum reads it too
    return Op(stage, kind, flops, least, unfused, inner, 1, weight * grad.dw)


def norm(stage: str, rows: int, dim: int, rules: Rules, grad: Grad = FROZEN, *, residual: bool = True) -> Op:
    """LayerNorm. residual: its backward also adds the gradient that went past it."""
    size = rows * dim * rules.item
    least = unfused = 2 * size
    if grad.dx or grad.dw:
        least += (3 + residual) * size
        unfused += (3 + 3 * residual) * size
    return Op(stage, "norm", 0, least, unfused)


def scores(queries: int, keys: int, rules: Rules, causal: bool) -> int:
    """Pairs of a query and a key of one sequence that count."""
    return queries * (keys + 1) // 2 if causal and rules.causal and queries == keys else queries * keys


def attention(
    stage: str,
    sequences: int,
    queries: int,
    keys: int,
    dim: int,
    rules: Rules,
    grad: Grad = FROZEN,
    *,
    causal: bool = False,
) -> Op:
    """softmax(q k^T) v of all heads together, `dim` wide."""
    product = 2 * sequences * scores(queries, keys, rules, causal) * dim
    q, kv = sequences * queries * dim, 2 * sequences * keys * dim
    least = unfused = 2 * q + kv
    products = 2
    if grad.dx or grad.dw:
        products += 4 + rules.recompute_scores
        least += 4 * q + 2 * kv
        unfused += 4 * q + 2 * kv + 4 * (q + kv)  # autograd stacks the three gradients, and copies them once more
    return Op(stage, "attention", products * product, least * rules.item, unfused * rules.item)


def attention_half(
    stage: str,
    sequences: int,
    n: int,
    dim: int,
    rules: Rules,
    grad: Grad = FROZEN,
    *,
    rows: int | None = None,
    causal: bool = False,
) -> list[Op]:
    """x + proj(attention(qkv(norm(x)))).   rows: of each sequence so many outputs are read; None: all n."""
    tokens, read = sequences * n, sequences * (n if rows is None else rows)
    if rows is None:
        qkv = [linear(stage, "qkv", tokens, dim, 3 * dim, rules, grad)]
    else:
        qkv = [
            linear(stage, "qkv", tokens, dim, 2 * dim, rules, grad),
            linear(stage, "qkv", read, dim, dim, rules, grad),
        ]
    return [
        norm(stage, tokens, dim, rules, grad),
        *qkv,
        attention(stage, sequences, read // max(sequences, 1), n, dim, rules, grad, causal=causal),
        linear(stage, "proj", read, dim, dim, rules, grad, residual=True),
    ]


def mlp_half(stage: str, tokens: int, dim: int, hidden: int, rules: Rules, grad: Grad = FROZEN) -> list[Op]:
    """x + fc2(gelu(fc1(norm(x))))."""
    return [
        norm(stage, tokens, dim, rules, grad),
        linear(stage, "fc1", tokens, dim, hidden, rules, grad, gelu=True),
        linear(stage, "fc2", tokens, hidden, dim, rules, grad, residual=True),
    ]


def blocks(config: "ViTConfig", stage: str, sequences: int, n: int, rules: Rules, grad: Grad = FROZEN) -> list[Op]:
    """All blocks of a ViT over sequences of n tokens."""
    D = config.embed_dim
    one = attention_half(stage, sequences, n, D, rules, grad)
    one += mlp_half(stage, sequences * n, D, config.mlp_dim, rules, grad)
    return repeat(one, config.depth)


def patch_dim(config: "ViTConfig") -> int:
    return config.in_chans * config.tubelet_size * config.patch_size**2


def encoder(
    config: "ViTConfig",
    stage: str,
    sequences: int,
    n: int,
    rules: Rules,
    grad: Grad = FROZEN,
    embedded: int | None = None,
) -> list[Op]:
    """Patch embedding, blocks and final norm.   embedded: tokens of a sequence that are embedded, n unless given."""
    rows = sequences * (n if embedded is None else embedded)
    first = Grad(False, grad.dw)
    ops = [linear(stage, "embed", rows, patch_dim(config), config.embed_dim, rules, first, pixels=True)]
    ops += blocks(config, stage, sequences, n, rules, grad)
    if config.final_norm:
        ops.append(norm(stage, sequences * n, config.embed_dim, rules, grad, residual=False))
    return ops


def pool(stage: str, sequences: int, n: int, dim: int, rules: Rules, grad: Grad = FROZEN) -> Op:
    """Mean over the tokens of a sequence, and its norm."""
    size = (sequences * n + sequences) * dim * rules.item
    moved = size * (1 + (grad.dx or grad.dw))
    return Op(stage, "pool", 0, moved, moved)


def decoder_tokens(stage: str, visible: int, rows: int, width: int, rules: Rules, grad: Grad = FROZEN) -> Op:
    """What a masked decoder reads: `visible` tokens, and mask tokens in the rest of the rows, positions added."""
    moved = (visible + rows) * width * rules.item * (1 + grad.dx)
    return Op(stage, "tokens", 0, moved, moved + rows * width * rules.item * (1 + grad.dx))


def inference(
    config: "ViTConfig", n: int, views: int, clips: int = 1, embedded: int | None = None, rules: Rules | None = None
) -> list[Op]:
    """A batch's ensemble: `views` sequences a clip of n kept tokens each, to class scores."""
    rules = rules or Rules()
    sequences, stage = clips * views, "encoder"
    ops = encoder(config, stage, sequences, n, rules, embedded=embedded)
    ops.append(pool(stage, sequences, n, config.embed_dim, rules))
    return [*ops, linear(stage, "head", sequences, config.embed_dim, config.num_classes, rules)]


def optimizer(ops: Iterable[Op], rules: Rules) -> Op:
    """AdamW: reads a weight, its gradient and two moments, writes three of them."""
    moved = 7 * rules.master * sum(op.trained for op in ops)
    return Op("optimizer", "optimizer", 0, moved, moved)


def pretraining(
    config: "MAEConfig", visible: int, source: int = 1, target: int = 0, rules: Rules | None = None
) -> list[Op]:
    """A step of masked pre-training, forward, backward and optimiser.

    visible: tokens of a clip that are kept; all others are decoded. source, target: clips; the class branch, where there are
    classes, sees the source alone.
    """
    rules = rules or Rules()
    clips, removed, width = source + target, config.num_tokens - visible, config.decoder_embed_dim
    tokens = clips * config.num_tokens
    ops = encoder(config.encoder, "encoder", clips, visible, rules, TRAINED)
    ops.append(linear("decoder", "to decoder", clips * visible, config.embed_dim, width, rules, TRAINED))
    ops.append(decoder_tokens("decoder", clips * visible, tokens, width, rules, TRAINED))
    ops += blocks(config.decoder, "decoder", clips, config.num_tokens, rules, TRAINED)
    ops.append(norm("decoder", clips * removed, width, rules, TRAINED, residual=False))
    ops.append(linear("decoder", "head", clips * removed, width, config.patch_dim, rules, TRAINED))
    pred, pixels = clips * removed * config.patch_dim * rules.item, clips * removed * config.patch_dim * rules.pixel
    # Unfused: pixels become float patches, which are normalised (two passes) and compared.
    ops.append(Op("decoder", "loss", 0, 3 * pred + 2 * pixels, 9 * pred + pixels))
    if config.num_classes:
        ops.append(pool("classes", source, visible, config.embed_dim, rules, TRAINED))
        ops.append(linear("classes", "class head", source, config.embed_dim, config.num_classes, rules, TRAINED))
    return [*ops, optimizer(ops, rules)]


def distillation(
    student: "ViTConfig", teachers: dict[str, "ViTConfig"], n: int, clips: int = 1, rules: Rules | None = None
) -> list[Op]:
    """A step of distillation: the student's forward and backward, the teachers' forward, a two-layer MLP for each."""
    rules = rules or Rules()
    D = student.embed_dim
    ops = encoder(student, "student", clips, n, rules, TRAINED)
    ops.append(pool("student", clips, n, D, rules, TRAINED))
    for name, config in teachers.items():
        ops += encoder(config, f"teacher {name}", clips, n, rules)
        ops.append(pool(f"teacher {name}", clips, n, config.embed_dim, rules))
        ops += repeat([linear("translate", "translate", clips, D, D, rules, TRAINED)], 2)
    return [*ops, optimizer(ops, rules)]
