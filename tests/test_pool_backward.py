"""Gradients of segment_mean_norm and ensemble_probs: kernels and references against float64."""

from typing import Any

import pytest
import torch
from lanes import BOTH, KERNEL, gpu, interpret
from numerics import assert_close_to_truth
from torch import Tensor

from mmfast_kernels.pool import (
    ensemble_backward_op,
    ensemble_probs,
    ensemble_probs_ref,
    pool_backward_op,
    segment_mean_norm,
    segment_mean_norm_ref,
)

NORMS = {
    "mean": (),
    "fc_norm": ("weight", "bias"),
    "norm": ("token_weight", "token_bias"),
    "both": ("weight", "bias", "token_weight", "token_bias"),
}
LENGTHS = [5, 0, 1, 19, 2]  # an empty sequence, one token, more than one token in every part


def inputs(
    norms: str, d: int, tokens: int, sequences: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> dict[str, Tensor]:
    """tokens, the norms' parameters, and the cotangent dy."""
    g = torch.Generator().manual_seed(d)
    made = {"tokens": torch.randn(tokens, d, generator=g) + 1, "dy": torch.randn(sequences, d, generator=g)}
    made |= {name: torch.randn(d, generator=g) + 1 for name in NORMS[norms]}
    return {name: t.to(device, dtype) for name, t in made.items()}


def bounds(device: str = "cpu") -> Tensor:
    return torch.tensor([0, *LENGTHS]).cumsum(0).to(device, torch.int32)


def check(
    given: dict[str, Tensor], cu: Tensor | None, length: int | None = None, wanted: list[str] | None = None
) -> list[Tensor]:
    names = [name for name in given if name != "dy"]

    def gradients(inputs: dict[str, Tensor], op: Any) -> list[Tensor]:
        leaves = {name: inputs[name].detach().requires_grad_(name in (wanted or names)) for name in names}
        y = op(cu_seqlens=cu, length=length, **leaves)
        return list(torch.autograd.grad(y, [t for t in leaves.values() if t.requires_grad], inputs["dy"].to(y.dtype)))

    got = gradients(given, segment_mean_norm)
    plain = gradients(given, segment_mean_norm_ref)
    truth = gradients({name: t.double() for name, t in given.items()}, segment_mean_norm_ref)
    for name, mine, theirs, exact in zip(wanted or names, got, plain, truth, strict=True):
        assert mine.dtype == given[name].dtype
        assert_close_to_truth("d" + name, mine, theirs, exact)
    return got


@pytest.mark.parametrize("norms", NORMS)
@pytest.mark.parametrize("d", [8, 100])
@pytest.mark.parametrize(("device", "dtype"), KERNEL)
def test_unequal_lengths(norms: str, d: int, device: str, dtype: torch.dtype, poisoned_empty: None) -> None:
    check(inputs(norms, d, sum(LENGTHS), len(LENGTHS), dtype, device), bounds(device))


@pytest.mark.parametrize("norms", NORMS)
@pytest.mark.parametrize("sequences", [0, 1, 3])
@pytest.mark.parametrize(("device", "dtype"), KERNEL)
def test_equal_lengths(norms: str, sequences: int, device: str, dtype: torch.dtype, poisoned_empty: None) -> None:
    check(inputs(norms, 40, 10 * sequences, sequences, dtype, device), None, length=10)


@gpu
@pytest.mark.parametrize("d", [384, 768, 1024, 1408, 3000, 16384])
@pytest.mark.parametrize("norms", ["fc_norm", "both"])
def test_model_shapes_on_gpu(d: int, norms: str, poisoned_empty: None) -> None:
    given = inputs(norms, d, 4 * 392, 4, torch.bfloat16, "cuda")
    check({name: t.float() if t.dim() == 1 else t for name, t in given.items()}, None, length=392)


@interpret
def test_fp32_norms_of_half_tokens(poisoned_empty: None) -> None:
    given = inputs("both", 40, sum(LENGTHS), len(LENGTHS), torch.float16)
    check({name: t.float() if t.dim() == 1 else t for name, t in given.items()}, bounds())


@interpret
@pytest.mark.parametrize("wanted", [["tokens"], ["weight", "bias"], ["token_bias"], ["tokens", "weight"]], ids="-".join)
def test_only_what_is_wanted(wanted: list[str], poisoned_empty: None) -> None:
    check(inputs("both", 24, sum(LENGTHS), len(LENGTHS)), bounds(), wanted=wanted)


@interpret
def test_strided_inputs_and_cotangents(poisoned_empty: None) -> None:
    wide = inputs("both", 72, 12, 3)
    check({name: t[:, 4:36] if t.dim() == 2 else t[4:68:2] for name, t in wide.items()}, None, length=4)
    turned = inputs("both", 24, 12, 3)
    check({name: t.t().contiguous().t() if t.dim() == 2 else t for name, t in turned.items()}, None, length=4)
    check(turned | {"dy": torch.ones(()).expand(3, 24)}, None, length=4)


@interpret
def test_same_bits_every_time() -> None:
    given = inputs("both", 40, sum(LENGTHS), len(LENGTHS))
    dy = given.pop("dy")
    leaves = {name: t.clone().requires_grad_() for name, t in given.items()}
    pooled = segment_mean_norm(cu_seqlens=bounds(), **leaves)
    runs = [torch.autograd.grad(pooled, leaves.values(), dy, retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@interpret
def test_what_is_saved() -> None:
    """Without a norm of the tokens, none of the tokens."""
    given = inputs("fc_norm", 8, 12, 3)
    leaves = {name: given[name].requires_grad_() for name in ("tokens", "weight", "bias")}
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        segment_mean_norm(cu_seqlens=None, length=4, **leaves)
    assert sorted(kept) == [(3,), (3,), (3, 8), (8,), (8,)]


@pytest.mark.parametrize(("device", "dtype"), KERNEL)
@pytest.mark.parametrize("shape", [(0, 2, 5), (1, 1, 1), (2, 3, 204)], ids=str)
def test_ensemble_gradient(shape: tuple[int, int, int], device: str, dtype: torch.dtype, poisoned_empty: None) -> None:
    g = torch.Generator().manual_seed(0)
    logits = (torch.randn(shape, generator=g) * 3).to(device, dtype)
    dprobs = torch.randn(shape[0], shape[2], generator=g).to(device)

    def gradient(logits: Tensor, op: Any) -> Tensor:
        leaf = logits.detach().requires_grad_()
        probs = op(leaf)
        return torch.autograd.grad(probs, leaf, dprobs.to(probs.dtype))[0]

    got = gradient(logits, ensemble_probs)
    assert got.dtype == dtype
    assert_close_to_truth(
        "dlogits", got, gradient(logits, ensemble_probs_ref), gradient(logits.double(), ensemble_probs)
    )


@pytest.mark.parametrize("lane", BOTH)
@pytest.mark.parametrize("dense", [True, False])
def test_compiles_as_one_graph(dense: bool, lane: str) -> None:
    given = inputs("both", 16, 12, 3)
    given.pop("dy")
    leaves = {name: t.clone().requires_grad_() for name, t in given.items()}
    cu = torch.tensor([0, 5, 5, 12], dtype=torch.int32)

    def head(cu: Tensor, **leaves: Tensor) -> Tensor:
        pooled = segment_mean_norm(cu_seqlens=None if dense else cu, length=4 if dense else None, **leaves)
        return ensemble_probs(pooled.view(1, -1, 16))[:, :5].square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(cu, **leaves), leaves.values())
    torch.testing.assert_close(got, torch.autograd.grad(head(cu, **leaves), leaves.values()))


@interpret
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("norms", NORMS)
def test_opcheck(norms: str, dense: bool) -> None:
    t = inputs(norms, 8, 12, 3)
    saved = [torch.randn(3, 8), torch.randn(3), torch.rand(3)][: 3 if "weight" in t else 1]
    cu = None if dense else torch.tensor([0, 5, 5, 12], dtype=torch.int32)
    params = [t.get(name) for name in NORMS["both"]]
    tokens = t["tokens"] if "token_weight" in t else None
    for wants_tokens in (False, True):
        args = (t["dy"], saved, tokens, cu, 4 if dense else 0, 12, *params, 1e-6, wants_tokens)
        torch.library.opcheck(pool_backward_op, args)


@interpret
def test_ensemble_opcheck() -> None:
    torch.library.opcheck(ensemble_backward_op, (torch.randn(2, 5), torch.randn(2, 3, 5)))
