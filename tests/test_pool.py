"""segment_mean_norm and ensemble_probs: kernels and references against float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lanes import KERNEL, interpret
from numerics import assert_close_to_truth
from torch import Tensor

from mmfast_kernels.pool import (
    ensemble_op,
    ensemble_probs,
    ensemble_probs_ref,
    pool_op,
    segment_mean,
    segment_mean_norm,
    segment_mean_norm_ref,
)

NORMS = {
    "mean": (),
    "fc_norm": ("weight", "bias"),
    "norm": ("token_weight", "token_bias"),
    "both": ("weight", "bias", "token_weight", "token_bias"),
}
LENGTHS = [5, 0, 1, 33, 2]  # an empty sequence, one token, more than a block of rows in every part


def inputs(
    d: int, tokens: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(d)
    x = torch.randn(tokens, d, generator=g) + 1
    params = {name: torch.randn(d, generator=g) + 1 for name in ("weight", "bias", "token_weight", "token_bias")}
    return x.to(device, dtype), {name: p.to(device, dtype) for name, p in params.items()}


def bounds(device: str = "cpu") -> Tensor:
    return torch.tensor([0, *LENGTHS]).cumsum(0).to(device, torch.int32)


def check(x: Tensor, cu: Tensor | None, params: dict[str, Tensor], length: int | None = None) -> None:
    got = segment_mean_norm(x, cu, length=length, **params)
    plain = segment_mean_norm_ref(x, cu, length=length, **params)
    truth = segment_mean_norm_ref(x.double(), cu, length=length, **{k: v.double() for k, v in params.items()})
    assert got.dtype == x.dtype
    assert_close_to_truth("pooled", got, plain, truth)


@pytest.mark.parametrize("norms", NORMS)
@pytest.mark.parametrize("d", [8, 100, 192])
@pytest.mark.parametrize(("device", "dtype"), KERNEL)
def test_unequal_lengths(norms: str, d: int, device: str, dtype: torch.dtype, poisoned_empty: None) -> None:
    x, params = inputs(d, sum(LENGTHS), dtype, device)
    check(x, bounds(device), {name: params[name] for name in NORMS[norms]})


@pytest.mark.parametrize(("device", "dtype"), KERNEL)
@pytest.mark.parametrize("sequences", [0, 1, 3])
def test_equal_lengths(sequences: int, device: str, dtype: torch.dtype, poisoned_empty: None) -> None:
    x, params = inputs(40, 10 * sequences, dtype, device)
    check(x, None, params, length=10)


@pytest.mark.parametrize(("device", "dtype"), KERNEL)
@pytest.mark.parametrize("sequences", [0, 3])
def test_means_unrounded(sequences: int, device: str, dtype: torch.dtype, poisoned_empty: None) -> None:
    x, _ = inputs(40, 10 * sequences, dtype, device)
    got = segment_mean(x, 10)
    assert got.dtype == torch.float32
    plain = x.view(-1, 10, 40).mean(1, dtype=torch.float32)
    assert_close_to_truth("mean", got, plain, x.view(-1, 10, 40).double().mean(1))


@pytest.mark.gpu
@pytest.mark.parametrize("d", [384, 768, 1024, 1408, 3000, 16384])
@pytest.mark.parametrize("norms", ["fc_norm", "both"])
def test_model_shapes_on_gpu(d: int, norms: str) -> None:
    x, params = inputs(d, 3 * 392, torch.bfloat16, "cuda")
    check(x, None, {name: params[name].float() for name in NORMS[norms]}, length=392)


@interpret
def test_strided_tokens_and_fp32_weights(poisoned_empty: None) -> None:
    x, params = inputs(48, sum(LENGTHS), torch.float16)
    params = {name: p[5:37].float() for name, p in params.items()}
    check(x[:, 5:37], bounds(), params)


@interpret
def test_rows_beyond_a_part_stay_out_of_the_norm() -> None:
    """With eps 0 the norm of a row of zeros is NaN, and must not enter the sum."""
    x, params = inputs(24, 9)
    norm = {name: params[name] for name in NORMS["norm"]}
    got = segment_mean_norm(x, None, length=9, token_eps=0.0, **norm)
    torch.testing.assert_close(got, segment_mean_norm_ref(x, None, length=9, token_eps=0.0, **norm))


@interpret
def test_a_sequence_does_not_depend_on_its_batch() -> None:
    x, params = inputs(24, 60)
    whole = segment_mean_norm(x, None, length=20, **params)
    assert torch.equal(whole[1:2], segment_mean_norm(x[20:40], None, length=20, **params))


@pytest.mark.parametrize("lane", ["plain", pytest.param("kernel", marks=interpret)])
def test_an_empty_sequence_has_mean_zero(lane: str) -> None:
    x, params = inputs(8, 3)
    cu = torch.tensor([0, 3, 3], dtype=torch.int32)
    tokens = {name: params[name] for name in NORMS["norm"]}
    torch.testing.assert_close(segment_mean_norm(x, cu, **tokens)[1], torch.zeros(8))
    got = segment_mean_norm(x, cu, **params)[1]
    torch.testing.assert_close(got, params["bias"])


def test_reference_is_mean_and_layer_norm() -> None:
    x, p = inputs(12, 8)
    normed = F.layer_norm(x, (12,), p["token_weight"], p["token_bias"], 1e-5)
    want = F.layer_norm(normed.view(2, 4, 12).mean(1), (12,), p["weight"], p["bias"], 1e-5)
    got = segment_mean_norm_ref(x, None, length=4, eps=1e-5, token_eps=1e-5, **p)
    torch.testing.assert_close(got, want)
    cu = torch.tensor([0, 4, 8], dtype=torch.int32)
    torch.testing.assert_close(segment_mean_norm_ref(x, cu, eps=1e-5, token_eps=1e-5, **p), want)


@pytest.mark.parametrize("lane", ["plain", pytest.param("kernel", marks=interpret)])
def test_pooling_gradients(lane: str) -> None:
    x, params = inputs(6, 7)
    leaves = [t.double().requires_grad_() for t in (x, *params.values())]
    p = dict(zip(params, leaves[1:], strict=True))
    cu = torch.tensor([0, 2, 7], dtype=torch.int32)
    normed = F.layer_norm(leaves[0], (6,), p["token_weight"], p["token_bias"], 1e-6)
    means = torch.stack([normed[:2].mean(0), normed[2:].mean(0)])
    want = F.layer_norm(means, (6,), p["weight"], p["bias"], 1e-6)
    cotangent = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad(segment_mean_norm(leaves[0], cu, **p), leaves, cotangent)
    torch.testing.assert_close(got, torch.autograd.grad(want, leaves, cotangent))


@pytest.mark.parametrize(("device", "dtype"), KERNEL)
@pytest.mark.parametrize("shape", [(0, 2, 5), (1, 1, 1), (2, 3, 204), (2, 2, 1500)], ids=str)
def test_ensemble_kernel(shape: tuple[int, int, int], device: str, dtype: torch.dtype, poisoned_empty: None) -> None:
    logits = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 5).to(device, dtype)
    truth = ensemble_probs_ref(logits.double())
    assert_close_to_truth("probs", ensemble_probs(logits), ensemble_probs_ref(logits), truth)


@interpret
def test_ensemble_of_strided_logits() -> None:
    """Views before clips, as a loop over views stacks them; and classes that are not contiguous."""
    logits = torch.randn(3, 2, 40, generator=torch.Generator().manual_seed(0))
    for made in (logits.transpose(0, 1)[..., 4:33], logits.permute(0, 2, 1)):
        torch.testing.assert_close(ensemble_probs(made), ensemble_probs_ref(made))


@pytest.mark.parametrize("lane", ["plain", pytest.param("kernel", marks=interpret)])
def test_ensemble_of_extreme_logits(lane: str) -> None:
    """Large logits do not overflow, a class at -inf has probability 0, and a NaN is not hidden."""
    logits = torch.tensor(
        [[[1e4, 1e4 - 1, -1e4], [float("-inf"), 0.0, 0.0]], [[float("nan"), 0.0, 0.0], [0.0, 0.0, 0.0]]]
    )
    got = ensemble_probs(logits)
    torch.testing.assert_close(got, torch.softmax(logits, -1).mean(1), equal_nan=True)
    assert got[1].isnan().all()


@pytest.mark.parametrize("lane", ["plain", pytest.param("kernel", marks=interpret)])
def test_compiles_as_one_graph(lane: str) -> None:
    x, params = inputs(16, sum(LENGTHS))

    def head(x: Tensor, cu: Tensor) -> Tensor:
        return ensemble_probs(segment_mean_norm(x, cu, **params).view(1, -1, 16))

    torch.testing.assert_close(torch.compile(head, fullgraph=True, backend="aot_eager")(x, bounds()), head(x, bounds()))


@interpret
@pytest.mark.parametrize("dense", [True, False])
def test_pool_opcheck(dense: bool) -> None:
    x, p = inputs(8, 12)
    cu = None if dense else torch.tensor([0, 5, 12], dtype=torch.int32)
    norms = (p["weight"], p["bias"], 1e-6, p["token_weight"], p["token_bias"], 1e-6)
    torch.library.opcheck(pool_op, (x, cu, 4 if dense else 0, *norms, True))


@interpret
def test_ensemble_opcheck() -> None:
    torch.library.opcheck(ensemble_op, (torch.randn(2, 3, 5),))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"length": None}, ValueError, "either cu_seqlens or length"),
        ({"length": 5}, ValueError, "length takes a divisor of T = 12, got 5"),
        ({"length": None, "cu_seqlens": torch.tensor([0, 12])}, TypeError, "cu_seqlens takes torch.int32"),
        ({"weight": None}, ValueError, "takes weight with its bias"),
        ({"token_bias": torch.ones(3)}, ValueError, r"token_bias takes \[8\], got \(3,\)"),
        ({"tokens": torch.ones(12)}, ValueError, r"tokens takes \[T, D\]"),
    ],
)
def test_wrong_pooling_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    x, params = inputs(8, 12)
    with pytest.raises(error, match=message):
        segment_mean_norm(**({"tokens": x, "cu_seqlens": None, "length": 4, **params} | change))


def test_wrong_logits() -> None:
    with pytest.raises(ValueError, match=r"\[B, P, K\] .* got \(2, 5\)"):
        ensemble_probs(torch.ones(2, 5))
