"""What a masked autoencoder's decoder reads (VideoMAE, arXiv 2203.12602): visible tokens and mask tokens, placed.

y[r] = (visible[source[r]] if source[r] >= 0 else mask_token) + pos[token_idx[r]]

dvisible = dy[place]
dmask_token = sum of dy[r] over source[r] < 0, in a fixed number of parts, fp32
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmfast_kernels import tables
from mmfast_kernels.dispatch import HAVE_TRITON, needs_grad, register, use_kernel

if HAVE_TRITON:
    from mmfast_kernels import mae_triton


def geometry(d: int, config: Mapping[str, Any]) -> dict[str, int]:
    """The kernels' block: columns that divide d where they can, and as many rows as its elements hold."""
    even = min(d & -d, 256)
    chunk = even if even >= 64 else min(256, 1 << (d - 1).bit_length())
    return {"D": d, "CHUNK": chunk, "ROWS": max(config["elements"] // chunk, 1), "num_warps": config["num_warps"]}


def _fwd(
    visible: Tensor,
    mask_token: Tensor,
    pos: Tensor,
    source: Tensor,
    token_idx: Tensor,
    place: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    if not use_kernel(visible, mask_token, pos):
        return decoder_tokens_ref(visible, mask_token, pos, source, token_idx, out_dtype)
    visible = visible if visible.stride(1) == 1 else visible.contiguous()
    pos = pos if pos.stride(1) == 1 else pos.contiguous()
    mask_token, source, token_idx = mask_token.contiguous(), source.contiguous(), token_idx.contiguous()
    y = _fwd_fake(visible, mask_token, pos, source, token_idx, place, out_dtype)
    n_rows, d = y.shape

    def run(config: Mapping[str, Any]) -> None:
        options = geometry(d, config)
        programs = math.ceil(n_rows / options["ROWS"]) * math.ceil(d / options["CHUNK"])
        mae_triton.decoder_tokens_kernel[(programs,)](
            visible, mask_token, pos, source, token_idx, y, visible.stride(0), pos.stride(0), n_rows, **options
        )

    if y.numel():
        with torch.cuda.device_of(visible):
            run(tables.config("decoder_tokens", run, d=d))
    return y


def _fwd_fake(
    visible: Tensor,
    mask_token: Tensor,
    pos: Tensor,
    source: Tensor,
    token_idx: Tensor,
    place: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    return torch.empty((source.shape[0], visible.shape[1]), dtype=out_dtype, device=visible.device)


def _sum(dy: Tensor, source: Tensor, place: Tensor) -> Tensor:
    """fp32 [D]: the sum of dy's rows that a mask token stands in."""
    if not use_kernel(dy):
        return dy.to(torch.float32, copy=True).index_fill_(0, place.long(), 0.0).sum(0)
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    source = source.contiguous()
    n_rows, d = dy.shape

    def run(config: Mapping[str, Any]) -> Tensor:
        parts, options = config["PARTS"], geometry(d, config)
        sums = torch.empty((parts, d), dtype=torch.float32, device=dy.device)
        mae_triton.masked_rows_sum_kernel[(parts * math.ceil(d / options["CHUNK"]),)](
            dy, source, sums, dy.stride(0), n_rows, PARTS=parts, **options
        )
        return sums

    with torch.cuda.device_of(dy):
        return run(tables.config("decoder_tokens", run, d=d)).sum(0)


def _sum_fake(dy: Tensor, source: Tensor, place: Tensor) -> Tensor:
    return torch.empty(dy.shape[1], dtype=torch.float32, device=dy.device)


decoder_tokens_op = register(
    "decoder_tokens(Tensor visible, Tensor mask_token, Tensor pos, Tensor source, Tensor token_idx, Tensor place, "
    "ScalarType out_dtype) -> Tensor",
    _fwd,
    _fwd_fake,
)
masked_rows_sum_op = register("masked_rows_sum(Tensor dy, Tensor source, Tensor place) -> Tensor", _sum, _sum_fake)


class _DecoderTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        visible: Tensor,
        mask_token: Tensor,
        pos: Tensor,
        source: Tensor,
        token_idx: Tensor,
        place: Tensor,
        out_dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(source, place)
        ctx.dtypes = (visible.dtype, mask_token.dtype)
        return decoder_tokens_op(visible, mask_token, pos, source, token_idx, place, out_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        source, place = ctx.saved_tensors
        dvisible = dmask = None
        if ctx.needs_input_grad[0]:
            dvisible = dy.index_select(0, place).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            dmask = masked_rows_sum_op(dy, source, place).to(ctx.dtypes[1])
        return dvisible, dmask, None, None, None, None, None


def decoder_tokens(
    visible: Tensor, mask_token: Tensor, pos: Tensor, source: Tensor, token_idx: Tensor, place: Tensor
) -> Tensor:
    """The decoder's input: each row a visible token or the mask token, its position added.

    visible: [Tv, D]. mask_token: [D]. pos: [N, D] fp32, a constant. source: [R] int32, the row of visible that stands in
    each row, -1 for the mask token. token_idx: [R] int32, rows of pos. place: [Tv] int32, source's inverse: the row in
    which each visible token stands, each in one. Returns [R, D] in visible's dtype; under autocast fp32, the dtype of
    the residual stream. Gradients for visible and mask_token, deterministic.
    Ids out of range are not looked for on a GPU. Raises ValueError, TypeError.
    """
    _check(visible, mask_token, pos, source, token_idx, place)
    out_dtype = visible.dtype
    double = torch.float64 in (visible.dtype, mask_token.dtype, pos.dtype)
    if torch.is_autocast_enabled(visible.device.type) and not double:
        out_dtype = torch.float32
    if double or (torch.compiler.is_compiling() and not use_kernel(visible)):
        return decoder_tokens_ref(visible, mask_token, pos, source, token_idx, out_dtype)
    run = _DecoderTokens.apply if needs_grad(visible, mask_token) else decoder_tokens_op
    return run(visible, mask_token, pos, source, token_idx, place, out_dtype)


def _check(visible: Tensor, mask_token: Tensor, pos: Tensor, source: Tensor, token_idx: Tensor, place: Tensor) -> None:
    if visible.dim() != 2 or visible.shape[1] == 0:
        raise ValueError(f"decoder_tokens: visible takes [Tv, D], got {tuple(visible.shape)}")
    count, d = visible.shape
    if mask_token.shape != (d,):
        raise ValueError(f"decoder_tokens: mask_token takes [{d}], got {tuple(mask_token.shape)}")
    if pos.dim() != 2 or pos.shape[1] != d:
        raise ValueError(f"decoder_tokens: pos takes [N, {d}], got {tuple(pos.shape)}")
    if pos.requires_grad:
        raise ValueError("decoder_tokens: pos takes a constant, got one that requires grad")
    if pos.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"decoder_tokens: pos takes torch.float32, got {pos.dtype}")
    for name, tensor in (("visible", visible), ("mask_token", mask_token)):
        if not tensor.is_floating_point():
            raise TypeError(f"decoder_tokens: {name} takes a floating dtype, got {tensor.dtype}")
    for name, ids in (("source", source), ("token_idx", token_idx), ("place", place)):
        if ids.dtype != torch.int32:
            raise TypeError(f"decoder_tokens: {name} takes torch.int32, got {ids.dtype}")
    if source.dim() != 1 or token_idx.shape != source.shape:
        raise ValueError(
            f"decoder_tokens: token_idx takes [R] as source, got {tuple(token_idx.shape)} for {tuple(source.shape)}"
        )
    if place.shape != (count,):
        raise ValueError(f"decoder_tokens: place takes [{count}], one row a visible token, got {tuple(place.shape)}")
    given = {"mask_token": mask_token, "pos": pos, "source": source, "token_idx": token_idx, "place": place}
    for name, tensor in given.items():
        if tensor.device != visible.device:
            raise ValueError(f"decoder_tokens: {name} is on {tensor.device}, visible on {visible.device}")


def decoder_tokens_ref(
    visible: Tensor,
    mask_token: Tensor,
    pos: Tensor,
    source: Tensor,
    token_idx: Tensor,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """decoder_tokens in plain torch. out_dtype: visible's by default."""
    wide = torch.promote_types(visible.dtype, mask_token.dtype)
    tokens = torch.cat((visible.to(wide), mask_token.to(wide).unsqueeze(0)))
    row = torch.where(source < 0, visible.shape[0], source)
    return (tokens.index_select(0, row) + pos.index_select(0, token_idx)).to(out_dtype or visible.dtype)
