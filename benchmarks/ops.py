"""Every op with random inputs, its providers, a float64 truth, and the bytes and operations it cannot do without.

bytes: each input read once and each output written once. flops: a multiply and an add are two.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peers import have_onednn
from torch import Tensor
from variants import forced_backends, relative_error

from mmfast_kernels import backends
from mmfast_kernels.attention import packed_attention
from mmfast_kernels.gather import gather_tubes, gather_tubes_ref
from mmfast_kernels.mlp import linear_gelu
from mmfast_kernels.norm import add_layer_norm, layer_norm
from mmfast_kernels.patches import tube_embed
from mmfast_kernels.pool import ensemble_probs, segment_mean_norm
from mmfast_kernels.sampling import sample_keep, sample_keep_ref

EPS = 1e-6
Inputs = Sequence[Any]


@dataclass(frozen=True)
class Op:
    """providers and truth take the inputs that make() gives; "mmfast" and "torch" are always among the providers.

    Where truth gives several tensors, as gradients are, providers give as many, in any layout of their elements' order.
    bar: a relative error that passes, whatever plain torch's. in_place: providers write over their inputs.
    """

    name: str
    shape: str
    make: Callable[[], Inputs]
    providers: dict[str, Callable[..., Any]]
    truth: Callable[..., Any]
    bytes: int
    flops: int
    bar: float = 1e-5
    in_place: bool = False

    @torch.no_grad()
    def check(self) -> tuple[dict[str, float], dict[str, str]]:
        """Relative error of every provider against the truth, and what was raised by those that cannot run."""
        inputs = self.make()
        truth = self.truth(*inputs)
        errors, raised = {}, {}
        for name, provider in self.providers.items():
            try:
                errors[name] = difference(provider(*(copies(inputs) if self.in_place else inputs)), truth)
            except Exception as error:  # a provider that cannot run here is reported, of whatever it dies
                raised[name] = f"{type(error).__name__}: {(str(error) or ' ').splitlines()[0]}"
        return errors, raised

    def allowed(self, errors: dict[str, float]) -> float:
        """Twice plain torch's own error, the bar at least."""
        return max(self.bar, 2 * errors["torch"])


def copies(inputs: Inputs) -> Inputs:
    return [x.clone() if isinstance(x, Tensor) else x for x in inputs]


def difference(result: Any, truth: Any) -> float:
    """The largest relative error; NaN where there is one."""
    pairs = [(first(result), truth)] if isinstance(truth, Tensor) else list(zip(result, truth, strict=True))
    errors = [relative_error(got.reshape(right.shape), right) for got, right in pairs]
    return float("nan") if any(error != error for error in errors) else max(errors)


def first(result: Any) -> Tensor:
    """The tensor that is compared: of several, the last (add_layer_norm gives the sum, then its norm)."""
    return result[-1] if isinstance(result, tuple | list) else result


@dataclass(frozen=True)
class Bench:
    """Where and in what size: sequences S of n tokens, width D in heads of 64."""

    device: torch.device
    dtype: torch.dtype
    sequences: int
    n: int
    dim: int

    @property
    def rows(self) -> int:
        return self.sequences * self.n

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device=self.device).to(dtype or self.dtype)

    def compiled(self, function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
        """The function under torch.compile, on CUDA only: it takes seconds, and the CPU has nothing to show for it."""
        if self.device.type != "cuda":
            return {}
        return {"torch.compile": torch.compile(function, dynamic=False, mode="max-autotune-no-cudagraphs")}


def norm_ops(b: Bench) -> list[Op]:
    D, size, shape = b.dim, b.dtype.itemsize, f"{b.rows}x{b.dim}"

    def make() -> Inputs:
        return b.random(b.rows, D), b.random(D), b.random(D)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (D,), weight, bias, EPS)

    def plain_add(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        total = x + branch
        return total, F.layer_norm(total, (D,), weight, bias, EPS)

    def add_truth(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x.double() + branch.double(), (D,), weight.double(), bias.double(), EPS)

    return [
        Op(
            "layer_norm",
            shape,
            make,
            {"mmfast": lambda x, w, c: layer_norm(x, w, c, EPS), "torch": plain, **b.compiled(plain)},
            lambda x, w, c: F.layer_norm(x.double(), (D,), w.double(), c.double(), EPS),
            bytes=2 * b.rows * D * size,
            flops=8 * b.rows * D,
        ),
        Op(
            "add_layer_norm",
            shape,
            lambda: (b.random(b.rows, D), *make()),
            {"mmfast": lambda x, r, w, c: add_layer_norm(x, r, w, c, EPS), "torch": plain_add, **b.compiled(plain_add)},
            add_truth,
            bytes=4 * b.rows * D * size,
            flops=9 * b.rows * D,
        ),
    ]


def gelu_op(b: Bench, ratio: int = 4) -> Op:
    D, hidden = b.dim, ratio * b.dim

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(F.linear(x, weight, bias))

    providers: dict[str, Callable[..., Any]] = {"mmfast": lambda x, w, c: linear_gelu(x, w, c, mode="erf")}
    if b.dtype != torch.float32:
        providers["mmfast, tanh"] = lambda x, w, c: linear_gelu(x, w, c, mode="tanh")
    providers["torch"] = plain
    if b.dtype != torch.float32:
        providers["torch, tanh"] = lambda x, w, c: F.gelu(F.linear(x, w, c), approximate="tanh")
    if b.device.type == "cuda" and b.dtype != torch.float32:
        # cuBLASLt's own epilogue, which is the usual tanh form.
        providers["_addmm_activation"] = lambda x, w, c: torch._addmm_activation(c, x, w.t(), use_gelu=True)
    if b.device.type == "cpu" and have_onednn():
        providers["torch, oneDNN"] = lambda x, w, c: torch.ops.mkldnn._linear_pointwise(x, w, c, "gelu", [], "none")
    providers |= b.compiled(plain)
    return Op(
        "linear_gelu",
        f"{b.rows}x{D}->{hidden}",
        lambda: (b.random(b.rows, D), b.random(hidden, D) * D**-0.5, b.random(hidden)),
        providers,
        lambda x, w, c: F.gelu(F.linear(x.double(), w.double(), c.double())),
        bytes=(b.rows * (D + hidden) + D * hidden) * b.dtype.itemsize,
        flops=2 * b.rows * D * hidden,
    )


def attention_op(b: Bench) -> Op:
    """Of a packed QKV product, as a model has it; "contiguous" kernels get q, k and v copied apart beforehand."""
    S, n, H, d = b.sequences, b.n, b.dim // 64, 64

    def make() -> Inputs:
        qkv = b.random(S * n, 3 * b.dim)
        return qkv, *(x.contiguous() for x in heads_first(qkv))

    def heads_first(qkv: Tensor) -> tuple[Tensor, ...]:
        return qkv.view(S, n, 3, H, d).permute(2, 0, 3, 1, 4).unbind(0)

    def packed(qkv: Tensor) -> list[Tensor]:
        return list(qkv.view(-1, 3, H, d).unbind(1))

    def dense(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda qkv, *apart: attention(*heads_first(qkv)).transpose(1, 2).reshape(S * n, H, d)

    def contiguous(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda qkv, *apart: attention(*apart).transpose(1, 2)

    def truth(qkv: Tensor, *apart: Tensor) -> Tensor:
        q, k, v = (x.double() for x in heads_first(qkv))
        outputs = [(a @ c.transpose(-2, -1) * d**-0.5).softmax(-1) @ e for a, c, e in zip(q, k, v, strict=True)]
        return torch.stack(outputs).transpose(1, 2)

    providers: dict[str, Callable[..., Any]] = {
        "mmfast": lambda qkv, *apart: packed_attention(*packed(qkv), length=n),
        "torch": dense(F.scaled_dot_product_attention),
        "torch, contiguous": contiguous(F.scaled_dot_product_attention),
    }
    if b.device.type == "cuda":
        for ours in ("triton", "wgmma"):
            if backends.refusal(ours, backends.Case(b.device, b.dtype, d, n, n)) is None:
                providers[f"mmfast, {ours}"] = lambda qkv, *apart, f=ours: packed_attention(
                    *packed(qkv), length=n, backend=f
                )
        for name, kernel in forced_backends(b.dtype).items():
            providers[f"torch, {name}"] = dense(kernel)
            providers[f"torch, {name}, contiguous"] = contiguous(kernel)
        if b.dtype != torch.float32:
            starts = torch.arange(0, S * n + 1, n, dtype=torch.int32, device=b.device)
            providers |= varlen(packed, starts, n)
            for name, theirs in flash_attn_peers().items():
                providers[name] = lambda qkv, *apart, f=theirs: f(*qkv.view(S, n, 3, H, d).unbind(2))
    return Op(
        "packed_attention",
        f"S{S} n{n} H{H} d{d}",
        make,
        providers,
        truth,
        bytes=4 * b.rows * b.dim * b.dtype.itemsize,
        flops=4 * S * n * n * b.dim,
    )


def varlen(packed: Callable[[Tensor], Sequence[Tensor]], starts: Tensor, n: int) -> dict[str, Callable[..., Tensor]]:
    """torch's attention over cu_seqlens, where this torch has it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return {}

    def run(qkv: Tensor, *apart: Tensor) -> Tensor:
        q, k, v = packed(qkv)
        return output_of(varlen_attn(q, k, v, starts, starts, n, n))

    return {"torch, varlen": run}


def flash_attn_peers() -> dict[str, Callable[..., Tensor]]:
    """flash-attn's kernels that are installed, each of q, k, v [S, n, H, d]."""
    found: dict[str, Callable[..., Tensor]] = {}
    for name, module in (("flash-attn 2", "flash_attn"), ("flash-attn 4", "flash_attn.cute")):
        try:
            attention = importlib.import_module(module).flash_attn_func
        except (ImportError, OSError, AttributeError):  # absent, built for another torch, or without it
            continue
        found[name] = lambda q, k, v, f=attention: output_of(f(q, k, v))
    return found


def output_of(result: Any) -> Tensor:
    """Of an attention that may give the sums' logarithms too."""
    return result[0] if isinstance(result, tuple) else result


def pool_ops(b: Bench, views: int = 2, classes: int = 204) -> list[Op]:
    S, n, D, clips = b.sequences, b.n, b.dim, max(1, b.sequences // views)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x.unflatten(0, (S, n)).mean(1), (D,), weight, bias, EPS)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return segment_mean_norm(x, None, length=n, weight=weight, bias=bias, eps=EPS)

    def pool_truth(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x.double().unflatten(0, (S, n)).mean(1), (D,), weight.double(), bias.double(), EPS)

    return [
        Op(
            "segment_mean_norm",
            f"S{S} n{n} D{D}",
            lambda: (b.random(b.rows, D), b.random(D), b.random(D)),
            {"mmfast": ours, "torch": plain, **b.compiled(plain)},
            pool_truth,
            bytes=(b.rows + S) * D * b.dtype.itemsize,
            flops=b.rows * D + 8 * S * D,
        ),
        Op(
            "ensemble_probs",
            f"B{clips} P{views} K{classes}",
            lambda: (b.random(clips, views, classes),),
            {"mmfast": ensemble_probs, "torch": lambda x: x.float().softmax(-1).mean(1)},
            lambda x: x.double().softmax(-1).mean(1),
            bytes=clips * classes * (views * b.dtype.itemsize + 4),
            flops=5 * clips * views * classes,
        ),
    ]


def pixel_ops(b: Bench, views: int = 2) -> list[Op]:
    """Sampler, gather and embedding of ViT's 16 x 224 x 224 clips; b.n must be 8 times the cells kept."""
    clips, grid, kept = max(1, b.sequences // views), (8, 14, 14), b.n // 8
    T, patch_dim = clips * views * b.n, 3 * 2 * 16 * 16
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    scale, shift = (1 / (255 * std)).to(b.device), (-mean / std).to(b.device)

    def pixels() -> tuple[Tensor, Tensor, Tensor]:
        frames = torch.randint(0, 256, (clips, 16, 224, 224, 3), dtype=torch.uint8, device=b.device)
        ids = torch.arange(clips, device=b.device)
        keep = sample_keep(ids, views, grid, kept, 0).reshape(-1)
        clip_of = ids.to(torch.int32).repeat_interleave(views * b.n)
        return frames.permute(0, 4, 1, 2, 3), keep, clip_of

    def weights() -> tuple[Tensor, Tensor, Tensor]:
        weight = b.random(b.dim, 3, 2, 16, 16) * patch_dim**-0.5
        return weight, b.random(b.dim), b.random(1568, b.dim, dtype=torch.float32)

    def embed(video: Tensor, keep: Tensor, clip_of: Tensor, weight: Tensor, bias: Tensor, pos: Tensor) -> Tensor:
        return tube_embed(video, weight, bias, pos, keep, clip_of, scale=scale, shift=shift)

    def in_torch(dtype: torch.dtype) -> Callable[..., Tensor]:
        def run(video: Tensor, keep: Tensor, clip_of: Tensor, weight: Tensor, bias: Tensor, pos: Tensor) -> Tensor:
            rows = gather_tubes_ref(video, keep, clip_of, 2, 16, scale, shift).to(dtype)
            return F.linear(rows, weight.flatten(1).to(dtype), bias.to(dtype)) + pos.to(dtype)[keep]

        return run

    plain = in_torch(b.dtype)
    return [
        Op(
            "sample_keep",
            f"B{clips} P{views} {kept}/196",
            lambda: (torch.arange(clips, device=b.device),),
            {
                "mmfast": lambda ids: sample_keep(ids, views, grid, kept, 0),
                "torch": lambda ids: sample_keep_ref(ids, views, grid, kept, 0),
            },
            lambda ids: sample_keep_ref(ids, views, grid, kept, 0),
            bytes=8 * clips + 4 * T,
            flops=0,
        ),
        Op(
            "gather_tubes",
            f"T{T} uint8",
            pixels,
            {
                "mmfast": lambda video, keep, clip_of: gather_tubes(video, keep, clip_of, 2, 16),
                "torch": lambda video, keep, clip_of: gather_tubes_ref(video, keep, clip_of, 2, 16),
            },
            lambda video, keep, clip_of: gather_tubes_ref(video, keep, clip_of, 2, 16),
            bytes=T * (2 * patch_dim + 8),
            flops=0,
        ),
        Op(
            "tube_embed",
            f"T{T} uint8->{b.dim}",
            lambda: (*pixels(), *weights()),
            {"mmfast": embed, "torch": plain, **b.compiled(plain)},
            in_torch(torch.float64),
            bytes=T * (patch_dim + 8 + b.dim * b.dtype.itemsize) + patch_dim * b.dim * b.dtype.itemsize,
            flops=2 * T * patch_dim * b.dim,
        ),
    ]


def all_ops(b: Bench) -> list[Op]:
    return [*norm_ops(b), gelu_op(b), attention_op(b), *pool_ops(b), *pixel_ops(b)]
