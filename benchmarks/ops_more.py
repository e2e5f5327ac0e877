"""More ops for run_all.py, as ops.py has them: forward and backward together, and those of adapters, EVL and pre-training.

A backward alone cannot be captured apart from its forward, so both are timed as one, as a training step runs them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from ops import EPS, Bench, Inputs, Op, flash_attn_peers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmfast.adapters import FrameLayout
from mmfast_kernels.attention import packed_self_attention
from mmfast_kernels.mae import masked_patch_mse
from mmfast_kernels.mlp_block import mlp
from mmfast_kernels.norm import add_layer_norm, layer_norm
from mmfast_kernels.ted import Taps, ted_stencil
from mmfast_kernels.temporal import temporal_cross_attention

KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
KERNELS |= {"efficient": SDPBackend.EFFICIENT_ATTENTION}


def double(*inputs: Any) -> list[Any]:
    return [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]


def trained(forward: Callable[..., Tensor], leaves: int) -> Callable[..., tuple[Tensor, ...]]:
    """The gradients of the first `leaves` inputs, given as last input the gradient of the output (None: of a scalar)."""

    def run(*inputs: Any) -> tuple[Tensor, ...]:
        *given, dy = inputs
        with torch.enable_grad():
            taken = [x.detach().requires_grad_() for x in given[:leaves]]
            return torch.autograd.grad(forward(*taken, *given[leaves:]), taken, dy)

    return run


def exact(forward: Callable[..., Tensor], leaves: int) -> Callable[..., tuple[Tensor, ...]]:
    """`trained` in float64."""
    run = trained(forward, leaves)
    return lambda *inputs: run(*double(*inputs))


def norm_training(b: Bench) -> list[Op]:
    D, size, shape = b.dim, b.dtype.itemsize, f"{b.rows}x{b.dim}"

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (D,), weight, bias, EPS)

    def plain_add(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        total = x + branch
        return total + F.layer_norm(total, (D,), weight, bias, EPS)

    def ours_add(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        total, normed = add_layer_norm(x, branch, weight, bias, EPS)
        return total + normed

    def make() -> Inputs:
        return b.random(b.rows, D), b.random(D), b.random(D), b.random(b.rows, D)

    def providers(ours: Callable[..., Tensor], plain: Callable[..., Tensor], leaves: int) -> dict[str, Any]:
        compiled = {name: trained(call, leaves) for name, call in b.compiled(plain).items()}
        return {"mmfast": trained(ours, leaves), "torch": trained(plain, leaves), **compiled}

    return [
        Op(
            "layer_norm, forward and backward",
            shape,
            make,
            providers(lambda x, w, c: layer_norm(x, w, c, EPS), plain, 3),
            exact(plain, 3),
            bytes=5 * b.rows * D * size,
            flops=20 * b.rows * D,
        ),
        Op(
            # Both outputs are used, as in a block: their sum stands for what comes after.
            "add_layer_norm, forward and backward",
            shape,
            lambda: (b.random(b.rows, D), *make()),
            providers(ours_add, plain_add, 4),
            exact(plain_add, 4),
            bytes=11 * b.rows * D * size,
            flops=24 * b.rows * D,
        ),
    ]


def attention_training(b: Bench) -> Op:
    """Gradients of q, k and v [S, n, H, d]; from a packed product they come back packed, "contiguous" ones apart."""
    S, n, H, d = b.sequences, b.n, b.dim // 64, 64

    def ours(qkv: Tensor) -> Tensor:
        return packed_self_attention(qkv.view(S * n, 3, H, d), length=n).view(S, n, H, d)

    def plain(qkv: Tensor) -> Tensor:
        q, k, v = qkv.view(S, n, 3, H, d).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def apart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def flash(attention: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda qkv: attention(*qkv.view(S, n, 3, H, d).unbind(2))

    def spelled(qkv: Tensor) -> Tensor:
        q, k, v = qkv.view(S, n, 3, H, d).permute(2, 0, 3, 1, 4).unbind(0)
        return ((q @ k.transpose(-2, -1) * d**-0.5).softmax(-1) @ v).transpose(1, 2)

    def packed(forward: Callable[[Tensor], Tensor]) -> Callable[..., Sequence[Tensor]]:
        run = trained(forward, 1)
        return lambda qkv, q, k, v, dy: run(qkv, dy)[0].view(S, n, 3, H, d).unbind(2)

    def contiguous(forward: Callable[..., Tensor]) -> Callable[..., Sequence[Tensor]]:
        run = trained(forward, 3)
        return lambda qkv, q, k, v, dy: [x.transpose(1, 2) for x in run(q, k, v, dy)]

    def forced(kernel: SDPBackend, call: Callable[..., Sequence[Tensor]]) -> Callable[..., Sequence[Tensor]]:
        def run(*inputs: Tensor) -> Sequence[Tensor]:
            with sdpa_kernel([kernel]):
                return call(*inputs)

        return run

    def make() -> Inputs:
        qkv = b.random(S * n, 3 * b.dim)
        q, k, v = (x.contiguous() for x in qkv.view(S, n, 3, H, d).permute(2, 0, 3, 1, 4).unbind(0))
        return qkv, q, k, v, b.random(S, n, H, d)

    def truth(qkv: Tensor, q: Tensor, k: Tensor, v: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        # A sequence at a time: the scores of all in float64 would not fit.
        run = trained(lambda x: spelled_one(x, H, d), 1)
        parts = [run(x.double(), g.double())[0] for x, g in zip(qkv.view(S, n, -1), dy, strict=True)]
        return torch.stack(parts).view(S, n, 3, H, d).unbind(2)

    providers: dict[str, Callable[..., Any]] = {
        "mmfast": packed(ours),
        "torch": packed(plain),
        "torch, contiguous": contiguous(apart),
    }
    if b.device.type == "cuda":
        for name, kernel in KERNELS.items():
            if b.dtype != torch.float32 or name == "efficient":
                providers[f"torch, {name}"] = forced(kernel, packed(plain))
                providers[f"torch, {name}, contiguous"] = forced(kernel, contiguous(apart))
        if b.dtype != torch.float32:
            providers |= {name: packed(flash(call)) for name, call in flash_attn_peers().items()}
    else:
        providers["torch, spelled out"] = packed(spelled)
    return Op(
        "packed_attention, forward and backward",
        f"S{S} n{n} H{H} d{d}",
        make,
        providers,
        truth,
        bytes=12 * b.rows * b.dim * b.dtype.itemsize,
        flops=14 * S * n * n * b.dim,  # two products forward, five backward
    )


def spelled_one(qkv: Tensor, H: int, d: int) -> Tensor:
    """Attention of one sequence by its equations.   qkv: [n, 3 H d].   Returns [n, H, d]."""
    q, k, v = qkv.view(-1, 3, H, d).permute(1, 2, 0, 3).unbind(0)
    return ((q @ k.transpose(-2, -1) * d**-0.5).softmax(-1) @ v).transpose(0, 1)


def mlp_training(b: Bench, ratio: int = 4) -> Op:
    D, hidden = b.dim, ratio * b.dim

    def plain(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)

    def make() -> Inputs:
        weights = b.random(hidden, D) * D**-0.5, b.random(hidden), b.random(D, hidden) * hidden**-0.5, b.random(D)
        return b.random(b.rows, D), *weights, b.random(b.rows, D)

    compiled = {name: trained(call, 5) for name, call in b.compiled(plain).items()}
    size = b.dtype.itemsize
    return Op(
        "mlp, forward and backward",
        f"{b.rows}x{D}->{hidden}->{D}",
        make,
        {"mmfast": trained(mlp, 5), "torch": trained(plain, 5), **compiled},
        exact(plain, 5),
        bytes=(b.rows * (5 * D + 7 * hidden) + 6 * D * hidden) * size,
        flops=12 * b.rows * D * hidden,
    )


def loss_ops(b: Bench, clips: int, side: int = 224, kept: int = 20) -> list[Op]:
    """MAE's loss on the removed tokens, forward alone and with its gradient.   side: of 16 frames; kept: cells a slot."""
    across = side // 16
    slots, cells = 8, across**2
    removed = torch.arange(slots * cells, device=b.device).view(slots, cells)[:, kept:].flatten().to(torch.int32)
    tokens = removed.repeat(clips)
    clip = torch.arange(clips, dtype=torch.int32, device=b.device).repeat_interleave(len(removed))
    R, K = len(tokens), 1536
    scale, shift = torch.full((3,), 1 / 255, device=b.device), torch.zeros(3, device=b.device)

    def make() -> Inputs:
        frames = torch.randint(0, 256, (clips, 16, side, side, 3), dtype=torch.uint8, device=b.device)
        return b.random(R, K), frames.permute(0, 4, 1, 2, 3), None

    def ours(pred: Tensor, video: Tensor) -> Tensor:
        return masked_patch_mse(pred, video, tokens, clip, tubelet=2, patch=16, scale=scale, shift=shift)

    def plain(pred: Tensor, video: Tensor) -> Tensor:
        wide = torch.promote_types(pred.dtype, torch.float32)
        patches = video.reshape(clips, 3, slots, 2, across, 16, across, 16).permute(0, 2, 4, 6, 3, 5, 7, 1)
        cubes = patches.reshape(clips, slots * cells, -1, 3)[clip, tokens].to(wide) / 255
        variance, mean = torch.var_mean(cubes, -2, keepdim=True)
        target = (cubes - mean) / (variance.sqrt() + 1e-6)
        return F.mse_loss(pred.to(wide), target.flatten(1))

    def alone(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda pred, video, dy: forward(pred, video)

    shape, size = f"{clips} clips, {R}x{K}", b.dtype.itemsize
    compiled = b.compiled(plain)
    return [
        Op(
            "masked_patch_mse",
            shape,
            make,
            {name: alone(call) for name, call in {"mmfast": ours, "torch": plain, **compiled}.items()},
            lambda pred, video, dy: plain(pred.double(), video),
            bytes=R * K * (size + 1),
            flops=8 * R * K,
        ),
        Op(
            "masked_patch_mse, forward and backward",
            shape,
            make,
            {name: trained(call, 1) for name, call in {"mmfast": ours, "torch": plain, **compiled}.items()},
            lambda pred, video, dy: exact(plain, 1)(pred, video, dy),
            bytes=R * K * (3 * size + 1),
            flops=12 * R * K,
        ),
    ]


def stencil_op(b: Bench, clips: int, frames: int = 8, grid: tuple[int, int] = (14, 14), hidden: int = 384) -> Op:
    """The TED-Adapter's convolutions over time and space, beside torch's depthwise ones."""
    layout = FrameLayout.dense(clips, frames, grid, device=b.device)
    tokens, rows = 1 + grid[0] * grid[1], clips * frames

    def make() -> Inputs:
        shapes = ((hidden,), (hidden, 3), (hidden,), (hidden,), (hidden, 9), (hidden,))
        return b.random(rows * tokens, 2 * hidden), *(0.3 * b.random(*shape) for shape in shapes)

    def ours(h: Tensor, *taps: Tensor) -> Tensor:
        return ted_stencil(h, Taps(*taps), layout.sites)

    def plain(h: Tensor, b1: Tensor, t1: Tensor, c1: Tensor, b2: Tensor, t2: Tensor, c2: Tensor) -> Tensor:
        x = h.view(clips, frames, tokens, 2 * hidden)
        time = (x[..., :hidden] + b1).permute(0, 3, 1, 2)
        u = F.conv2d(time, t1[:, None, :, None], c1, padding=(1, 0), groups=hidden).permute(0, 2, 3, 1)
        z = x[:, :, 1:, hidden:]
        change = z - torch.cat((z[:, :1], z[:, :-1]), 1) + b2
        image = change.reshape(rows, *grid, hidden).permute(0, 3, 1, 2)
        o = F.conv2d(image, t2.view(hidden, 1, 3, 3), c2, padding=1, groups=hidden).permute(0, 2, 3, 1)
        o = F.pad(o.reshape(clips, frames, tokens - 1, hidden), (0, 0, 1, 0))
        return torch.cat((u, o), -1).reshape(h.shape)

    return Op(
        "ted_stencil",
        f"{rows}x{tokens}x{2 * hidden}",
        make,
        {"mmfast": ours, "torch": plain, **b.compiled(plain)},
        lambda *inputs: plain(*double(*inputs)),
        bytes=2 * rows * tokens * 2 * hidden * b.dtype.itemsize,
        flops=2 * rows * tokens * hidden * (3 + 9),
    )


def temporal_op(b: Bench, views: int, frames: int = 8, side: int = 14, heads: int = 12, dim: int = 768) -> Op:
    """EVL's cross attention between neighbouring frames, beside the same restated in torch."""
    n, d, span = side * side, dim // heads, 2 * side - 1
    y, x = torch.arange(n) // side, torch.arange(n) % side
    places = ((y[:, None] - y + side - 1) * span + (x[:, None] - x + side - 1)).to(b.device)

    def make() -> Inputs:
        q, k = (b.random(views, frames, n, heads, d) for _ in range(2))
        return q, k, 0.1 * b.random(span * span, dim), 0.1 * b.random(span * span, dim)

    def ours(q: Tensor, k: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        return temporal_cross_attention(q, k, w1, w2, (side, side))

    def plain(q: Tensor, k: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        def taken(a: Tensor, c: Tensor, table: Tensor) -> Tensor:
            scores = (a * d**-0.5).transpose(2, 3) @ c.permute(0, 1, 3, 4, 2)
            probs = scores.to(torch.promote_types(a.dtype, torch.float32)).softmax(-1).mean(2).to(table.dtype)
            bins = probs.new_zeros(*probs.shape[:-1], len(table)).scatter(-1, places.expand(probs.shape), probs)
            return bins @ table

        before, after = taken(q[:, 1:], k[:, :-1], w1), taken(q[:, :-1], k[:, 1:], w2)
        return F.pad(before, (0, 0, 0, 0, 1, 0)) + F.pad(after, (0, 0, 0, 0, 0, 1))

    pairs = 2 * views * (frames - 1) * n * n
    return Op(
        "temporal_cross_attention",
        f"{views}x{frames}x{n} H{heads} d{d}",
        make,
        {"mmfast": ours, "torch": plain, **b.compiled(plain)},
        lambda *inputs: plain(*double(*inputs)),
        bytes=(3 * views * frames * n * dim + 2 * span * span * dim) * b.dtype.itemsize,
        flops=pairs * 4 * dim,
    )


def training_ops(b: Bench) -> list[Op]:
    return [*norm_training(b), attention_training(b), mlp_training(b)]
