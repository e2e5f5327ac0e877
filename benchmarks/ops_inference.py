"""Ops of fused, quantised and host-side inference for run_all.py, as ops.py has them.

A product in int8 or e4m3 is held to twice the error of the same rounding in plain torch, where the truth is of the numbers
before any rounding. INT8_BAR lets torch.ao in, whose scale of activations is one for all rows.
"""

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import workloads
from ops import EPS, Bench, Inputs, Op
from peers import have_onednn
from torch import Tensor, nn

from mmfast import sample_pack
from mmfast_kernels import fp8, int8
from mmfast_kernels.gather import gather_into, gather_tubes_ref, union_rows, union_rows_ref
from mmfast_kernels.kept import kept_ids
from mmfast_kernels.linear import add_linear_
from mmfast_kernels.standardise import standardise

INT8_BAR = 0.03
ENGINES = ("x86", "onednn", "fbgemm")  # of torch.ao's dynamic quantisation; qnnpack is for phones


def rules_of(b: Bench) -> workloads.Rules:
    return workloads.Rules(item=b.dtype.itemsize)


# -- fused blocks ------------------------------------------------------------------------------------------------------


def add_linear_op(b: Bench, inner: int) -> Op:
    """A block's projection, or its fc2: the residual added in the product's place. In place are all but "out of place"."""
    D, biased = b.dim, b.device.type == "cpu"  # on a GPU the fused blocks carry biases to the next norm

    def make() -> Inputs:
        bias = b.random(D) if biased else None
        return b.random(b.rows, D), b.random(b.rows, inner), b.random(D, inner) * inner**-0.5, bias

    def separate(total: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return total + F.linear(x, weight, bias)

    def addmm(total: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        total.addmm_(x, weight.t())
        return total if bias is None else total.add_(bias)

    providers: dict[str, Callable[..., Tensor]] = {
        "mmfast": add_linear_,
        "torch": lambda total, x, w, c: total.add_(F.linear(x, w, c)),
        "torch, out of place": separate,
        "torch, addmm": addmm,
        **b.compiled(separate),
    }
    if b.device.type == "cpu" and have_onednn():
        binary = torch.ops.mkldnn._linear_pointwise
        providers["torch, oneDNN"] = lambda total, x, w, c: total.add_(binary(x, w, c, "none", [], ""))
        providers["torch, oneDNN, its sum"] = lambda total, x, w, c: binary.binary(x, total, w, c, "add")
    return Op(
        "add_linear_",
        f"{b.rows}x{inner}->{D}",
        make,
        providers,
        lambda total, x, w, c: total.double() + F.linear(x.double(), w.double(), None if c is None else c.double()),
        bytes=workloads.linear("", "proj", b.rows, inner, D, rules_of(b), residual=True).least,
        flops=2 * b.rows * inner * D,
        in_place=True,
    )


def standardise_op(b: Bench) -> Op:
    D = b.dim

    def plain(x: Tensor, carry: Tensor) -> Tensor:
        return F.layer_norm(x + carry, (D,), eps=EPS)

    def affine(x: Tensor, carry: Tensor) -> Tensor:
        return F.layer_norm(x + carry, (D,), x.new_ones(D), x.new_zeros(D), EPS)

    return Op(
        "standardise",
        f"{b.rows}x{D}",
        lambda: (b.random(b.rows, D), b.random(D)),
        {
            "mmfast": lambda x, carry: standardise(x, carry, EPS),
            "torch": plain,
            "torch, with 1 and 0": affine,
            **b.compiled(plain),
        },
        lambda x, carry: plain(x.double(), carry.double()),
        bytes=workloads.norm("", b.rows, D, rules_of(b)).least,
        flops=8 * b.rows * D,
    )


# -- int8, on the CPU --------------------------------------------------------------------------------------------------


def dynamic_layers(layers: nn.Sequential, x: Tensor) -> dict[str, nn.Sequential]:
    """torch.ao's dynamic quantisation of linear layers, with every engine here that runs them."""
    made: dict[str, nn.Sequential] = {}
    before = torch.backends.quantized.engine
    for engine in ENGINES:
        if engine not in torch.backends.quantized.supported_engines:
            continue
        torch.backends.quantized.engine = engine
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # a deprecation
                how = {nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig}
                one = torch.ao.quantization.quantize_dynamic(copy.deepcopy(layers), how, dtype=torch.qint8)
                one(x)
        except RuntimeError:
            continue
        made[engine] = one
    torch.backends.quantized.engine = before
    return made


def int_mm(x: Tensor, weight: int8.Int8Weight) -> Tensor:
    """A product of rows rounded as they come, in plain torch."""
    scale = x.abs().amax(1, keepdim=True) / int8.LEVELS
    sums = torch._int_mm((x / scale).round().to(torch.int8), weight.values.t())
    y = sums * (scale * weight.scale)
    return y if weight.bias is None else y + weight.bias


def int8_ops(b: Bench, ratio: int = 4) -> list[Op]:
    """A linear layer, and the whole half of a block: norm, fc1, GELU, fc2 and the residual. Weights are rounded beforehand."""
    D, hidden, rows = b.dim, ratio * b.dim, b.rows
    norm, fc1, fc2 = nn.LayerNorm(D, EPS), nn.Linear(D, hidden), nn.Linear(hidden, D)
    layers = nn.Sequential(norm, fc1, nn.GELU(), fc2).requires_grad_(False)
    for layer in (fc1, fc2):
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    own = [int8.quantize_weight(layer.weight, layer.bias) for layer in (fc1, fc2)]
    affine = int8.Norm(norm.weight, norm.bias, EPS)
    theirs = dynamic_layers(layers, torch.zeros(2, D))

    def linear(x: Tensor) -> Tensor:
        return int8.to_float(int8.multiply(int8.to_rows(x), own[0]))

    def half(x: Tensor) -> Tensor:
        hidden = int8.to_rows(int8.multiply(int8.to_rows(x, norm=affine), own[0]), gelu="erf")
        return int8.to_float(int8.multiply(hidden, own[1]), x)

    def half_by_torch(x: Tensor) -> Tensor:
        return x + int_mm(F.gelu(int_mm(F.layer_norm(x, (D,), norm.weight, norm.bias, EPS), own[0])), own[1])

    def exactly(x: Tensor, module: nn.Module) -> Tensor:
        return copy.deepcopy(module).double()(x.double())

    first: dict[str, Callable[..., Tensor]] = {"torch, fp32": fc1}
    whole: dict[str, Callable[..., Tensor]] = {"torch, fp32": partial(added, layers)}
    for name, module in theirs.items():
        first[f"torch.ao, {name}"], whole[f"torch.ao, {name}"] = module[1], partial(added, module)
    if have_onednn():
        product = torch.ops.mkldnn._linear_pointwise

        def fp32_half(x: Tensor) -> Tensor:
            h = product(norm(x), fc1.weight, fc1.bias, "gelu", [], "none")
            return x + product(h, fc2.weight, fc2.bias, "none", [], "")

        first["torch, fp32, oneDNN"] = lambda x: product(x, fc1.weight, fc1.bias, "none", [], "")
        whole["torch, fp32, oneDNN"] = fp32_half
    return [
        Op(
            "int8 linear",
            f"{rows}x{D}->{hidden}",
            lambda: (b.random(rows, D),),
            {"mmfast": linear, "torch": lambda x: int_mm(x, own[0]), **first},
            lambda x: exactly(x, fc1),
            bytes=4 * rows * (D + hidden) + D * hidden,
            flops=2 * rows * D * hidden,
            bar=INT8_BAR,
        ),
        Op(
            "int8 norm, MLP and residual",
            f"{rows}x{D}->{hidden}->{D}",
            lambda: (b.random(rows, D),),
            {"mmfast": half, "torch": half_by_torch, **whole},
            lambda x: x.double() + exactly(x, layers),
            bytes=4 * rows * 2 * D + 2 * D * hidden,
            flops=4 * rows * D * hidden,
            bar=INT8_BAR,
        ),
    ]


def added(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return x + module(x)


# -- fp8, on a GPU; where no kernel runs it is emulated ----------------------------------------------------------------


def e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows rounded as they come, and their scale [T, 1], in plain torch."""
    scale = x.abs().amax(1, keepdim=True).float() / fp8.LARGEST
    return (x / scale).clamp(-fp8.LARGEST, fp8.LARGEST).to(fp8.E4M3), scale


def by_wide_product(x: Tensor, weight: fp8.Fp8Weight) -> Tensor:
    """The product of rounded numbers in x's dtype, which holds each of them."""
    rows, scale = e4m3(x)
    y = F.linear(rows.to(x.dtype), weight.values.to(x.dtype)).float() * scale * weight.scale
    return (y if weight.bias is None else y + weight.bias).to(x.dtype)


def by_scaled_mm(x: Tensor, weight: fp8.Fp8Weight) -> Tensor:
    """The product by the library's own kernel, which takes scales of rows and columns."""
    rows, scale = e4m3(x)
    bias = None if weight.bias is None else weight.bias.to(x.dtype)
    return torch._scaled_mm(rows, weight.values.t(), scale, weight.scale[None], bias=bias, out_dtype=x.dtype)


def fp8_ops(b: Bench, ratio: int = 4) -> list[Op]:
    """Norm and QKV product, and the half of a block with the MLP. Weights are rounded beforehand."""
    D, hidden, rows, size = b.dim, ratio * b.dim, b.rows, b.dtype.itemsize

    def layer(inner: int, wide: int) -> tuple[Tensor, Tensor]:
        return b.random(wide, inner) * inner**-0.5, b.random(wide)

    scale, shift = b.random(D), b.random(D)
    qkv, fc1, fc2 = (layer(*shape) for shape in ((D, 3 * D), (D, hidden), (hidden, D)))
    q_qkv, q_fc1, q_fc2 = (fp8.quantize_weight(*each) for each in (qkv, fc1, fc2))
    affine = fp8.Norm(scale, shift, EPS)

    def normed(x: Tensor) -> Tensor:
        return F.layer_norm(x, (D,), scale.to(x.dtype), shift.to(x.dtype), EPS)

    def ours(x: Tensor) -> Tensor:
        return fp8.fp8_linear(fp8.fp8_rows(x, norm=affine)[0], q_qkv, dtype=x.dtype)

    def our_half(x: Tensor) -> Tensor:
        rows, total = fp8.fp8_rows(x, norm=affine, before=q_fc1)
        return fp8.fp8_linear(fp8.fp8_linear_gelu(rows, q_fc1, "tanh"), q_fc2, total)

    def rounded(product: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: product(normed(x), q_qkv)

    def rounded_half(product: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: x + product(F.gelu(product(normed(x), q_fc1), approximate="tanh"), q_fc2)

    def wide(x: Tensor) -> Tensor:
        return F.linear(normed(x), *(t.to(x.dtype) for t in qkv))

    def wide_half(x: Tensor) -> Tensor:
        return x + F.linear(F.gelu(F.linear(normed(x), *(t.to(x.dtype) for t in fc1))), *(t.to(x.dtype) for t in fc2))

    def providers(own: Callable[..., Tensor], made: Callable[..., Any], plain: Callable[..., Tensor]) -> dict[str, Any]:
        found = {"mmfast": own, "torch": made(by_wide_product), f"torch, {str(b.dtype)[6:]}": plain}
        if b.device.type == "cuda":
            found["torch, _scaled_mm"] = made(by_scaled_mm)
            found |= {f"_scaled_mm, {name}": call for name, call in b.compiled(made(by_scaled_mm)).items()}
        return found

    return [
        Op(
            "fp8 norm and linear",
            f"{rows}x{D}->{3 * D}",
            lambda: (b.random(rows, D),),
            providers(ours, rounded, wide),
            lambda x: wide(x.double()),
            bytes=rows * 4 * D * size + 3 * D * D,
            flops=2 * rows * D * 3 * D,
        ),
        Op(
            "fp8 norm, MLP and residual",
            f"{rows}x{D}->{hidden}->{D}",
            lambda: (b.random(rows, D),),
            providers(our_half, rounded_half, wide_half),
            lambda x: wide_half(x.double()),
            bytes=rows * 2 * D * size + 2 * D * hidden,
            flops=4 * rows * D * hidden,
        ),
    ]


# -- what runs in host memory --------------------------------------------------------------------------------------------


def host_ops(b: Bench, views: int = 2, side: int = 224) -> list[Op]:
    """Masks to ids, the union of a clip's views, and the gather into memory that is there. b.n: 8 times the cells kept."""
    clips, slots, across = max(1, b.sequences // views), 8, side // 16
    grid, kept, row = (slots, across, across), b.n // slots, 3 * 2 * 16 * 16
    tokens, T = slots * across**2, clips * views * b.n
    pack = sample_pack(clips, views, grid, keep=kept)
    removed = torch.ones(clips * views, tokens, dtype=torch.bool)
    removed.scatter_(1, pack.keep_idx.view(clips * views, -1).long(), False)
    union = union_rows_ref(pack.keep_idx, pack.cu_seqlens, views)[0]

    def frames() -> Inputs:
        pixels = torch.randint(0, 256, (clips, 2 * slots, side, side, 3), dtype=torch.uint8)
        return pixels.permute(0, 4, 1, 2, 3), torch.empty(T, row, dtype=torch.uint8)

    def into(video: Tensor, out: Tensor) -> Tensor:
        gather_into(out, video, pack.keep_idx, pack.clip_idx, 2, 16)
        return out

    def by_index(video: Tensor, out: Tensor) -> Tensor:
        return out.copy_(gather_tubes_ref(video, pack.keep_idx, pack.clip_idx, 2, 16))

    numbers = torch.arange(tokens, dtype=torch.int32).expand(clips * views, -1)
    return [
        Op(
            "kept_ids",
            f"{clips * views}x{tokens}",
            lambda: (removed,),
            {
                "mmfast": kept_ids,
                "torch": lambda removed: numbers[~removed],
                "torch, argsort": lambda removed: removed.byte().argsort(dim=1, stable=True)[:, : b.n].flatten().int(),
            },
            lambda removed: numbers[~removed],
            bytes=removed.numel() + 4 * T,
            flops=0,
        ),
        Op(
            "union_rows",
            f"B{clips} P{views} T{T}",
            lambda: (pack.keep_idx, pack.cu_seqlens),
            {
                "mmfast": lambda ids, starts: torch.cat(union_rows(ids, starts, views)),
                "torch": lambda ids, starts: torch.cat(union_rows_ref(ids, starts, views)),
            },
            lambda ids, starts: torch.cat(union_rows_ref(ids, starts, views)),
            bytes=4 * (2 * T + 2 * len(union)),
            flops=0,
        ),
        Op(
            "gather_into",
            f"T{T} uint8",
            frames,
            {"mmfast": into, "torch": by_index},
            lambda video, out: gather_tubes_ref(video, pack.keep_idx, pack.clip_idx, 2, 16),
            bytes=T * 2 * row,
            flops=0,
        ),
    ]


def inference_ops(b: Bench) -> list[Op]:
    """All that run on the device."""
    found = [add_linear_op(b, b.dim), add_linear_op(b, 4 * b.dim), standardise_op(b)]
    if b.device.type == "cpu":
        return [*found, *int8_ops(b), *host_ops(b)]
    return [*found, *fp8_ops(b)]
