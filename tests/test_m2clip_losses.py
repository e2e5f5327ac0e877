"""The losses alone: their equations, gradients, bounds, and the contrastive one over ranks."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, multiprocessing
from torch.nn import functional as F

from mmfast.m2clip_losses import (
    LossWeights,
    class_cosines,
    cmc_loss,
    cmlm_loss,
    contrastive_loss,
    vc_loss,
)


def unit(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_contrastive_is_the_divergence_from_clips_of_the_same_label() -> None:
    v, t, labels = unit(5, 6), unit(5, 6, seed=1), torch.tensor([2, 0, 2, 1, 0])
    got = contrastive_loss(v, t, labels, 20.0)
    logits = 20 * F.normalize(v, dim=-1) @ F.normalize(t, dim=-1).t()
    target = (10.0 * (labels[:, None] == labels)).double().softmax(-1)
    parts = [(target * (target.log() - x.log_softmax(-1))).sum(-1).mean() for x in (logits, logits.t())]
    torch.testing.assert_close(got, sum(parts) / 2)


def test_contrastive_is_zero_where_the_cosines_say_what_the_labels_do() -> None:
    v = torch.eye(4, dtype=torch.float64)
    assert float(contrastive_loss(v, v, torch.arange(4), 10.0)) < 1e-12


@pytest.mark.parametrize("double_softmax", [False, True])
def test_cmc(double_softmax: bool) -> None:
    v, t, labels = unit(3, 6), unit(4, 6, seed=1), torch.tensor([3, 0, 3])
    logits = 100 * F.normalize(v, dim=-1) @ F.normalize(t, dim=-1).t()
    truth = F.cross_entropy(logits.softmax(-1) if double_softmax else logits, labels)
    torch.testing.assert_close(cmc_loss(v, t, labels, double_softmax=double_softmax), truth)


def test_double_softmax_keeps_the_loss_of_400_classes_between_4_99_and_6() -> None:
    t = torch.eye(400)
    right, wrong = (float(cmc_loss(t[:1], t, torch.tensor([i]), double_softmax=True)) for i in (0, 7))
    assert (round(right, 3), round(wrong, 3)) == (4.996, 5.996)
    assert float(cmc_loss(t[:1], t, torch.tensor([0]))) < 1e-6


def test_cmlm_is_the_mean_over_rows_that_count() -> None:
    logits, labels = unit(5, 4), torch.tensor([-100, 2, -100, 0, 3])
    truth = F.cross_entropy(logits[[1, 3, 4]], labels[[1, 3, 4]])
    torch.testing.assert_close(cmlm_loss(logits, labels), truth)


@pytest.mark.parametrize("rows", [0, 3])
def test_cmlm_of_rows_that_do_not_count_is_zero_with_zero_gradients(rows: int) -> None:
    logits = torch.randn(rows, 4, requires_grad=True)
    loss = cmlm_loss(logits, torch.full((rows,), -100))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not bool(logits.grad.any())


def test_losses_can_be_differentiated() -> None:
    v, t = unit(3, 4).requires_grad_(), unit(3, 4, seed=1).requires_grad_()
    labels = torch.tensor([1, 0, 1])
    assert torch.autograd.gradcheck(lambda a, b: contrastive_loss(a, b, labels, 5.0), (v, t))
    assert torch.autograd.gradcheck(lambda a, b: cmc_loss(a, b, labels, 5.0), (v, t))
    assert torch.autograd.gradcheck(lambda a: vc_loss(a, labels), (v,))


def test_half_precision_features_make_fp32_losses_under_autocast() -> None:
    v, t = torch.randn(4, 8), torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        got = class_cosines(v, t)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, class_cosines(v, t))
    assert contrastive_loss(v.bfloat16(), t.bfloat16(), torch.arange(4)).dtype == torch.float32


def test_the_total_is_the_weighted_sum() -> None:
    losses = {name: torch.tensor(float(i)) for i, name in enumerate(("contrastive", "cmc", "cmlm", "vc"), 1)}
    assert float(LossWeights().total(losses)) == pytest.approx((1 + 2) / 2 + 4 + 3 / 10)


def test_a_loss_of_weight_zero_cannot_spoil_the_total() -> None:
    losses = {name: torch.tensor(1.0) for name in ("contrastive", "cmc", "vc")} | {"cmlm": torch.tensor(float("nan"))}
    assert float(LossWeights(cmlm=0.0).total(losses)) == 2.0


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (dict(vc=-1.0), "vc must be a finite weight"),
        (dict(cmc=float("nan")), "cmc must be a finite weight"),
        (dict(contrastive=0.0, cmc=0.0, vc=0.0, cmlm=0.0), "weights must not all be 0"),
    ],
)
def test_bad_weights(weights: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossWeights(**weights)


def _rank(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    v, t, labels = unit(6, 5), unit(6, 5, seed=1), torch.tensor([0, 1, 2, 1, 0, 3])
    own = slice(3 * rank, 3 * rank + 3)
    mine = [x[own].clone().requires_grad_() for x in (v, t)]
    loss = contrastive_loss(*mine, labels[own], 20.0, gather=True)
    loss.backward()
    torch.save([loss.detach(), *(x.grad for x in mine)], os.path.join(folder, f"{rank}.pt"))
    distributed.destroy_process_group()


def test_gathered_over_ranks_it_is_the_loss_of_all_clips(tmp_path: Path) -> None:
    multiprocessing.spawn(_rank, (2, str(tmp_path)), nprocs=2)
    v, t = unit(6, 5).requires_grad_(), unit(6, 5, seed=1).requires_grad_()
    whole = contrastive_loss(v, t, torch.tensor([0, 1, 2, 1, 0, 3]), 20.0)
    whole.backward()
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.testing.assert_close(sum(r[0] for r in ranks) / 2, whole.detach())
    for i, x in ((1, v), (2, t)):
        # DDP takes the mean over ranks of what each finds.
        torch.testing.assert_close(torch.cat([r[i] for r in ranks]) / 2, x.grad)


def test_alone_gathering_changes_nothing() -> None:
    v, t, labels = unit(3, 4), unit(3, 4, seed=1), torch.arange(3)
    assert torch.equal(contrastive_loss(v, t, labels, gather=True), contrastive_loss(v, t, labels))
