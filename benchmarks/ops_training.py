"""What ops_more.py has not of training, for run_all.py: the decoder's tokens, and the other ops with their gradients."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ops
import ops_more
import torch
import torch.nn.functional as F
import workloads
from ops import EPS, Bench, Inputs, Op
from ops_more import KERNELS, exact, trained
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmfast import sample_pack
from mmfast.decoder_pack import decoder_pack
from mmfast_kernels.attention import packed_attention
from mmfast_kernels.mae import decoder_tokens
from mmfast_kernels.pool import ensemble_probs, segment_mean_norm


def decoder_ops(
    b: Bench, clips: int, width: int = 192, grid: tuple[int, int, int] = (8, 14, 14), kept: int = 20
) -> list[Op]:
    """The decoder's input, forward alone and with gradients of the visible tokens and the mask token; ways to make it:

    index: visible and mask tokens in one table, rows taken from it.   cat: the published one, visible ones before removed ones.
    scatter: mask tokens everywhere, visible ones written over them.
    """
    tokens = grid[0] * grid[1] * grid[2]
    plan = decoder_pack(sample_pack(clips, 1, grid, keep=kept, device=b.device), tokens)
    rows, visible = plan.source.shape[0], plan.place.shape[0]
    ids, place = plan.pack.keep_idx, plan.place.long()
    n = visible // clips
    taken = torch.where(plan.source < 0, visible, plan.source)
    first, last = (part.flatten() for part in ids.view(clips, tokens).split((n, tokens - n), 1))

    def make() -> Inputs:
        return b.random(visible, width), b.random(width), b.random(tokens, width, dtype=torch.float32)

    def ours(x: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
        return decoder_tokens(x, mask, pos, plan.source, ids, plan.place)

    def index(x: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
        table = torch.cat((x, mask[None]))
        return (table.index_select(0, taken) + pos.index_select(0, ids)).to(x.dtype)

    def cat(x: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
        seen = x.view(clips, n, width) + pos.index_select(0, first).view(clips, n, width)
        removed = mask + pos.index_select(0, last).view(clips, tokens - n, width)
        return torch.cat((seen.to(x.dtype), removed.to(x.dtype)), 1).flatten(0, 1)

    def scatter(x: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
        return (mask.expand(rows, -1).index_copy(0, place, x) + pos.index_select(0, ids)).to(x.dtype)

    plain: dict[str, Callable[..., Tensor]] = {"torch": index, "torch, cat": cat, "torch, scatter": scatter}
    for name, call in (("index", index), ("cat", cat)):
        plain |= {f"{kind}, {name}": made for kind, made in b.compiled(call).items()}
    ways = {"mmfast": ours, **plain}
    shape, rules = f"{clips} clips, {visible}+{rows - visible}x{width}", workloads.Rules(item=b.dtype.itemsize)
    moved = [
        workloads.decoder_tokens("", visible, rows, width, rules, grad).least + 4 * tokens * width
        for grad in (workloads.FROZEN, workloads.TRAINED)
    ]
    return [
        Op(
            "decoder_tokens",
            shape,
            make,
            ways,
            lambda x, mask, pos: index(x.double(), mask.double(), pos.double()),
            bytes=moved[0],
            flops=rows * width,
        ),
        Op(
            "decoder_tokens, forward and backward",
            shape,
            lambda: (*make(), b.random(rows, width)),
            {name: trained(call, 2) for name, call in ways.items()},
            exact(index, 2),
            bytes=moved[1],
            flops=2 * rows * width,
        ),
    ]


def pool_training(b: Bench, views: int = 2, classes: int = 204) -> list[Op]:
    S, n, D, clips = b.sequences, b.n, b.dim, max(1, b.sequences // views)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x.unflatten(0, (S, n)).mean(1), (D,), weight, bias, EPS)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return segment_mean_norm(x, None, length=n, weight=weight, bias=bias, eps=EPS)

    def probs(x: Tensor) -> Tensor:
        return x.to(torch.promote_types(x.dtype, torch.float32)).softmax(-1).mean(1)

    compiled = {name: trained(call, 3) for name, call in b.compiled(plain).items()}
    return [
        Op(
            "segment_mean_norm, forward and backward",
            f"S{S} n{n} D{D}",
            lambda: (b.random(b.rows, D), b.random(D), b.random(D), b.random(S, D)),
            {"mmfast": trained(ours, 3), "torch": trained(plain, 3), **compiled},
            exact(plain, 3),
            bytes=2 * (b.rows + S) * D * b.dtype.itemsize,
            flops=2 * b.rows * D + 20 * S * D,
        ),
        Op(
            "ensemble_probs, forward and backward",
            f"B{clips} P{views} K{classes}",
            lambda: (b.random(clips, views, classes), b.random(clips, classes, dtype=torch.float32)),
            {"mmfast": trained(ensemble_probs, 1), "torch": trained(probs, 1)},
            exact(probs, 1),
            bytes=clips * classes * (3 * views * b.dtype.itemsize + 8),
            flops=9 * clips * views * classes,
        ),
    ]


def embed_training(b: Bench) -> Op:
    """tube_embed of a clip a sequence, and the gradients of its weight and bias; pixels are a constant."""
    op = next(op for op in ops.pixel_ops(b, views=1) if op.name == "tube_embed")

    def ordered(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda weight, bias, video, keep, clip_of, pos: forward(video, keep, clip_of, weight, bias, pos)

    def make() -> Inputs:
        video, keep, clip_of, weight, bias, pos = op.make()
        return weight, bias, video, keep, clip_of, pos, b.random(len(keep), b.dim)

    size, weights = b.dtype.itemsize, 1536 * b.dim
    return replace(
        op,
        name="tube_embed, forward and backward",
        make=make,
        providers={name: trained(ordered(call), 2) for name, call in op.providers.items()},
        truth=exact(ordered(op.truth), 2),
        bytes=2 * op.bytes - weights * size + 4 * weights,
        flops=2 * op.flops,
    )


def query_training(b: Bench) -> Op:
    """One query a sequence over all its tokens, as a tower's last block has that is read at its class token alone."""
    S, n, H, d = b.sequences, b.n, b.dim // 64, 64

    def ours(q: Tensor, kv: Tensor) -> Tensor:
        return packed_attention(q, *kv.unbind(1), length=1, length_k=n)

    def plain(q: Tensor, kv: Tensor) -> Tensor:
        k, v = kv.view(S, n, 2, H, d).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q.unsqueeze(2), k, v).squeeze(2)

    def spelled(q: Tensor, kv: Tensor) -> Tensor:
        k, v = kv.view(S, n, 2, H, d).unbind(2)
        probs = torch.einsum("shd,snhd->shn", q * d**-0.5, k).softmax(-1)
        return torch.einsum("shn,snhd->shd", probs, v)

    def forced(kernel: SDPBackend) -> Callable[..., Any]:
        run = trained(plain, 2)

        def call(*inputs: Tensor) -> tuple[Tensor, ...]:
            with sdpa_kernel([kernel]):
                return run(*inputs)

        return call

    ways = {"mmfast": ours, "torch": plain, "torch, spelled out": spelled, **b.compiled(spelled)}
    providers = {name: trained(call, 2) for name, call in ways.items()}
    if b.device.type == "cuda" and b.dtype != torch.float32:
        providers |= {f"torch, {name}": forced(kernel) for name, kernel in KERNELS.items()}
    return Op(
        "packed_attention of one query, forward and backward",
        f"S{S} n{n} H{H} d{d}",
        lambda: (b.random(S, H, d), b.random(b.rows, 2, H, d), b.random(S, H, d)),
        providers,
        exact(spelled, 2),
        bytes=(3 * 2 * b.rows + 5 * S) * b.dim * b.dtype.itemsize,
        flops=14 * b.rows * b.dim,
    )


def with_gradients(op: Op, leaves: int, b: Bench, moved: int, products: int) -> Op:
    """A forward op of ops_more.py and the gradients of its first inputs.   moved: bytes. products: its operations times that."""

    def make() -> Inputs:
        given = op.make()
        with torch.no_grad():
            out = op.providers["torch"](*given)
        return *given, b.random(*out.shape)

    return replace(
        op,
        name=f"{op.name}, forward and backward",
        make=make,
        providers={name: trained(call, leaves) for name, call in op.providers.items()},
        truth=exact(op.providers["torch"], leaves),
        bytes=moved,
        flops=products * op.flops,
    )


def stencil_training(b: Bench, clips: int, **sizes: Any) -> Op:
    """Reads h twice and the output's gradient once; writes the output and h's gradient."""
    op = ops_more.stencil_op(b, clips, **sizes)
    return with_gradients(op, 7, b, 5 * op.bytes // 2, 3)


def temporal_training(b: Bench, views: int, **sizes: Any) -> Op:
    """Of q and k and both tables. Backward: the scores again, their gradients, and those of the four inputs."""
    op = ops_more.temporal_op(b, views, **sizes)
    return with_gradients(op, 4, b, 3 * op.bytes, 4)


def more_training_ops(b: Bench) -> list[Op]:
    return [*pool_training(b), embed_training(b), query_training(b)]
