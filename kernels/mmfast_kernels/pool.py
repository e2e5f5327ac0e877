"""From packed tokens to one vector a sequence, and from the views' logits to one distribution a clip.

    pooled[s] = norm(mean over the tokens t of sequence s of token_norm(tokens[t]))      either norm may be left out
    probs[b] = mean over views p of softmax(logits[b, p])

The mean has two steps and no atomics, so its result is the same every time: fp32 sums over a fixed number of parts of a
sequence, then their sum, division and norm.

Backward: the gradient of the norm of the mean is one of [S, D]; a token's is its sequence's, divided by the length and
taken back through the token's norm, whose statistics are taken again from the tokens. The token norm's parameters are
the same for every token, so their gradients come from the saved means of the normalised tokens, [S, D] too.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmfast_kernels import tables
from mmfast_kernels.dispatch import HAVE_TRITON, needs_grad, register, use_kernel
from mmfast_kernels.norm import MAX_COLUMNS, dense_rows, layer_norm_ref, norm_backward_op, piece_columns

if HAVE_TRITON:
    from mmfast_kernels import pool_triton


def geometry(d: int, config: Mapping[str, Any]) -> dict[str, int]:
    """Constants of the kernels that go through the tokens, rows of d columns."""
    warps, sharing = config["num_warps"], config["chunk_warps"]
    rows = max(config["elements"] * 32 * warps // d, warps // sharing)
    return {
        "D": d,
        "CHUNK": piece_columns(d, sharing),
        "ROWS": 1 << (rows.bit_length() - 1),
        "SPLITS": config["splits"],
        "num_warps": warps,
    }


def mean_geometry(d: int, config: Mapping[str, Any]) -> dict[str, int]:
    """Constants of the kernel that joins the sums."""
    warps = config["chunk_warps"]
    return {"D": d, "CHUNK": piece_columns(d, warps), "SPLITS": config["splits"], "num_warps": warps}


def _pool(
    tokens: Tensor,  # [T, D]
    cu_seqlens: Tensor | None,
    length: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    token_weight: Tensor | None,
    token_bias: Tensor | None,
    token_eps: float,
    stats: bool,
) -> list[Tensor]:
    tokens = dense_rows(tokens)
    cu_seqlens, weight, bias, token_weight, token_bias = (
        None if t is None else t.contiguous() for t in (cu_seqlens, weight, bias, token_weight, token_bias)
    )
    outputs = _pool_fake(tokens, cu_seqlens, length, weight, stats)
    y = outputs[0]
    mean, centre, rstd = [*outputs[1:], None, None, None][:3]
    sequences, d = y.shape
    if sequences == 0:
        return outputs
    config = tables.lookup("pool", d=d).config
    programs = sequences * config["splits"]
    sums = torch.empty((programs, d), dtype=torch.float32, device=tokens.device)
    with torch.cuda.device_of(tokens):
        pool_triton.segment_sums_kernel[(programs,)](
            tokens, cu_seqlens, sums, tokens.stride(0), length, token_eps,
            NORM=token_weight is not None, **geometry(d, config),
        )  # fmt: skip
        pool_triton.segment_mean_kernel[(sequences,)](
            sums, cu_seqlens, token_weight, token_bias, weight, bias, y, mean, centre, rstd, length, eps,
            **mean_geometry(d, config),
        )  # fmt: skip
    return outputs


def _pool_fake(
    tokens: Tensor, cu_seqlens: Tensor | None, length: int, weight: Tensor | None, *rest: Any
) -> list[Tensor]:
    stats = rest[-1]
    sequences = tokens.shape[0] // length if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (sequences, tokens.shape[1])
    outputs = [torch.empty(shape, dtype=tokens.dtype, device=tokens.device)]
    if stats:
        shapes = [shape, (sequences,), (sequences,)] if weight is not None else [shape]
        outputs += [torch.empty(s, dtype=torch.float32, device=tokens.device) for s in shapes]
    return outputs


def _pool_backward(
    dy: Tensor,  # [S, D]
    saved: list[Tensor],  # mean [S, D]; centre and rstd [S] of its norm
    tokens: Tensor | None,  # [T, D] with a norm of the tokens
    cu_seqlens: Tensor | None,
    length: int,
    n_tokens: int,
    weight: Tensor | None,
    bias: Tensor | None,
    token_weight: Tensor | None,
    token_bias: Tensor | None,
    token_eps: float,
    wants_tokens: bool,
) -> list[Tensor]:
    dmean = dy.float()
    lives = None if cu_seqlens is None else (cu_seqlens.diff() > 0)[:, None]
    gradients: list[Tensor] = []
    if weight is not None and bias is not None:
        mean, centre, rstd = saved
        if token_weight is not None and token_bias is not None:
            shift = token_bias.float() if lives is None else lives * token_bias.float()
            mean = torch.addcmul(shift, mean, token_weight.float())
        dmean, *gradients = norm_backward_op(
            None, dy, mean, None, None, weight, centre, rstd, bias.dtype, None, True, True
        )
    if token_weight is not None and token_bias is not None:
        gradients.append((dmean * saved[0]).sum(0).to(token_weight.dtype))
        gradients.append((dmean if lives is None else dmean * lives).sum(0).to(token_bias.dtype))
    if not wants_tokens:
        return gradients
    d = dy.shape[1]
    dtokens = torch.empty((n_tokens, d), dtype=dy.dtype, device=dy.device)
    if n_tokens:
        tokens = None if tokens is None else dense_rows(tokens)
        cu_seqlens, token_weight = (None if t is None else t.contiguous() for t in (cu_seqlens, token_weight))
        config = tables.lookup("pool", d=d).config
        with torch.cuda.device_of(dy):
            pool_triton.token_gradients_kernel[(dy.shape[0] * config["splits"],)](
                dmean.contiguous(), cu_seqlens, tokens, token_weight, dtokens,
                0 if tokens is None else tokens.stride(0), length, token_eps, **geometry(d, config),
            )  # fmt: skip
    return [dtokens, *gradients]


def _pool_backward_fake(
    dy: Tensor, saved: Any, tokens: Any, cu_seqlens: Any, length: int, n_tokens: int, *rest: Any
) -> list[Tensor]:
    *parameters, _, wants_tokens = rest
    dtokens = [torch.empty((n_tokens, dy.shape[1]), dtype=dy.dtype, device=dy.device)] if wants_tokens else []
    return dtokens + [torch.empty_like(p) for p in parameters if p is not None]


def _ensemble(logits: Tensor) -> Tensor:
    logits = logits if logits.stride(2) == 1 else logits.contiguous()
    clips, views, classes = logits.shape
    probs = _ensemble_fake(logits)
    block = min(1024, 1 << (classes - 1).bit_length())
    if clips:
        with torch.cuda.device_of(logits):
            pool_triton.ensemble_kernel[(clips * -(-classes // block),)](
                logits, probs, logits.stride(0), logits.stride(1), views, classes, BLOCK=block, num_warps=4
            )
    return probs


def _ensemble_fake(logits: Tensor) -> Tensor:
    return torch.empty((logits.shape[0], logits.shape[2]), dtype=torch.float32, device=logits.device)


def _ensemble_backward(dprobs: Tensor, logits: Tensor) -> Tensor:
    probs = torch.softmax(logits, -1, dtype=torch.float32)
    g = dprobs[:, None] / logits.shape[1]
    return (probs * (g - (probs * g).sum(-1, keepdim=True))).to(logits.dtype)


def _ensemble_backward_fake(dprobs: Tensor, logits: Tensor) -> Tensor:
    return torch.empty_like(logits)


# Returns pooled and, where stats are asked for, the means in fp32 and with weight the statistics of their norm.
pool_op = register(
    "segment_mean_norm(Tensor tokens, Tensor? cu_seqlens, int length, Tensor? weight, Tensor? bias, float eps, "
    "Tensor? token_weight, Tensor? token_bias, float token_eps, bool stats) -> Tensor[]",
    _pool,
    _pool_fake,
)
# Returns dtokens where it is wanted, then a gradient of every parameter given.
pool_backward_op = register(
    "segment_mean_norm_backward(Tensor dy, Tensor[] saved, Tensor? tokens, Tensor? cu_seqlens, int length, "
    "SymInt n_tokens, Tensor? weight, Tensor? bias, Tensor? token_weight, Tensor? token_bias, float token_eps, "
    "bool wants_tokens) -> Tensor[]",
    _pool_backward,
    _pool_backward_fake,
)
ensemble_op = register("ensemble_probs(Tensor logits) -> Tensor", _ensemble, _ensemble_fake)
ensemble_backward_op = register(
    "ensemble_probs_backward(Tensor dprobs, Tensor logits) -> Tensor", _ensemble_backward, _ensemble_backward_fake
)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        cu_seqlens: Tensor | None,
        length: int,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        token_weight: Tensor | None,
        token_bias: Tensor | None,
        token_eps: float,
    ) -> Tensor:
        y, *saved = pool_op(tokens, cu_seqlens, length, weight, bias, eps, token_weight, token_bias, token_eps, True)
        kept = tokens if token_weight is not None and ctx.needs_input_grad[0] else None
        ctx.save_for_backward(kept, cu_seqlens, weight, bias, token_weight, token_bias, *saved)
        ctx.length, ctx.n_tokens, ctx.token_eps = length, tokens.shape[0], token_eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        tokens, cu_seqlens, weight, bias, token_weight, token_bias, *saved = ctx.saved_tensors
        wants_tokens = ctx.needs_input_grad[0]
        made = pool_backward_op(
            dy, saved, tokens, cu_seqlens, ctx.length, ctx.n_tokens, weight, bias, token_weight, token_bias,
            ctx.token_eps, wants_tokens,
        )  # fmt: skip
        taken = iter(made)
        dtokens = next(taken) if wants_tokens else None
        dweight, dbias = (None, None) if weight is None else (next(taken), next(taken))
        dtoken_weight, dtoken_bias = (None, None) if token_weight is None else (next(taken), next(taken))
        return dtokens, None, None, dweight, dbias, None, dtoken_weight, dtoken_bias, None


class _Ensemble(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return ensemble_op(logits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dprobs: Tensor) -> Tensor:
        return ensemble_backward_op(dprobs, ctx.saved_tensors[0])


def segment_mean_norm(
    tokens: Tensor,
    cu_seqlens: Tensor | None,
    *,
    length: int | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    token_weight: Tensor | None = None,
    token_bias: Tensor | None = None,
    token_eps: float = 1e-6,
) -> Tensor:
    """Mean over each sequence, of its tokens or of their LayerNorm, and the LayerNorm of that mean.

    tokens: [T, D], D up to 16384. cu_seqlens: [S+1] int32 bounds, or None with length, the tokens of every sequence.
    token_weight, token_bias: [D], a norm of every token before the mean. weight, bias: [D], a norm of the mean.
    Returns [S, D] in the dtype of tokens; a sequence without tokens has mean 0. Raises ValueError, TypeError.
    """
    _check(tokens, cu_seqlens, length, {"weight": (weight, bias), "token_weight": (token_weight, token_bias)})
    norms = (weight, bias, eps, token_weight, token_bias, token_eps)
    if not use_kernel(tokens, weight, bias, token_weight, token_bias):
        return segment_mean_norm_ref(
            tokens, cu_seqlens, length=length, weight=weight, bias=bias, eps=eps,
            token_weight=token_weight, token_bias=token_bias, token_eps=token_eps,
        )  # fmt: skip
    args = (tokens, cu_seqlens, 0 if length is None else length, *norms)
    if needs_grad(tokens, weight, bias, token_weight, token_bias):
        return _Pool.apply(*args)
    return pool_op(*args, False)[0]


def segment_mean(tokens: Tensor, length: int) -> Tensor:
    """Mean over each sequence of `length` tokens as it was summed, unrounded. For inference: no gradient is recorded.

    tokens: [T, D], D up to 16384. Returns [S, D] fp32 (fp64 for fp64). Raises ValueError, TypeError.
    """
    _check(tokens, None, length, {})
    with torch.no_grad():
        if use_kernel(tokens):
            return pool_op(tokens, None, length, None, None, 1e-6, None, None, 1e-6, True)[1]
        return _mean_ref(tokens, None, length)


def _check(
    tokens: Tensor,
    cu_seqlens: Tensor | None,
    length: int | None,
    norms: dict[str, tuple[Tensor | None, Tensor | None]],
) -> None:
    if not tokens.is_floating_point():
        raise TypeError(f"segment_mean_norm: tokens takes a floating dtype, got {tokens.dtype}")
    if tokens.dim() != 2 or not 1 <= tokens.shape[1] <= MAX_COLUMNS:
        raise ValueError(f"segment_mean_norm: tokens takes [T, D] with D to {MAX_COLUMNS}, got {tuple(tokens.shape)}")
    if (cu_seqlens is None) == (length is None):
        raise ValueError("segment_mean_norm: takes either cu_seqlens or length")
    if length is not None and (length < 1 or tokens.shape[0] % length):
        raise ValueError(f"segment_mean_norm: length takes a divisor of T = {tokens.shape[0]}, got {length}")
    if cu_seqlens is not None:
        if cu_seqlens.dtype != torch.int32:
            raise TypeError(f"segment_mean_norm: cu_seqlens takes torch.int32, got {cu_seqlens.dtype}")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
            raise ValueError(f"segment_mean_norm: cu_seqlens takes [S+1], got {tuple(cu_seqlens.shape)}")
    for name, (scale, shift) in norms.items():
        if (scale is None) != (shift is None):
            raise ValueError(f"segment_mean_norm: takes {name} with its bias, got one of them")
        for given, tensor in ((name, scale), (name.replace("weight", "bias"), shift)):
            if tensor is not None and tensor.shape != tokens.shape[1:]:
                raise ValueError(f"segment_mean_norm: {given} takes [{tokens.shape[1]}], got {tuple(tensor.shape)}")


def ensemble_probs(logits: Tensor) -> Tensor:
    """Mean over views of the softmax over classes.

    logits: [B, P, K] with P and K at least 1, any float dtype, any strides. Returns [B, K] fp32 (fp64 for fp64).
    Raises ValueError, TypeError.
    """
    if not logits.is_floating_point():
        raise TypeError(f"ensemble_probs: logits takes a floating dtype, got {logits.dtype}")
    if logits.dim() != 3 or 0 in logits.shape[1:]:
        raise ValueError(f"ensemble_probs: logits takes [B, P, K] with P and K at least 1, got {tuple(logits.shape)}")
    if not use_kernel(logits):
        return ensemble_probs_ref(logits)
    return _Ensemble.apply(logits) if needs_grad(logits) else ensemble_op(logits)


def segment_mean_norm_ref(
    tokens: Tensor,
    cu_seqlens: Tensor | None,
    *,
    length: int | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    token_weight: Tensor | None = None,
    token_bias: Tensor | None = None,
    token_eps: float = 1e-6,
) -> Tensor:
    """segment_mean_norm in plain torch."""
    x = tokens
    if token_weight is not None and token_bias is not None:
        x = layer_norm_ref(x, token_weight, token_bias, token_eps)
    mean = _mean_ref(x, cu_seqlens, length)
    if weight is not None and bias is not None:
        mean = F.layer_norm(mean, weight.shape, weight.to(mean.dtype), bias.to(mean.dtype), eps)
    return mean.to(tokens.dtype)


def _mean_ref(x: Tensor, cu_seqlens: Tensor | None, length: int | None) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    if length is not None:
        return x.view(-1, length, x.shape[1]).mean(1, dtype=wide)
    assert cu_seqlens is not None
    lengths = cu_seqlens.long().diff()
    # A tenth of index_add's time on a CPU. unsafe: no look at the lengths, which would wait for a GPU.
    sums = torch.segment_reduce(x.to(wide), "sum", lengths=lengths, unsafe=True)
    return sums / lengths.clamp(min=1)[:, None]


def ensemble_probs_ref(logits: Tensor) -> Tensor:
    """ensemble_probs in plain torch."""
    return torch.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32)).mean(1)
