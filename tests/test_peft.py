"""Few-shot adaptation: the logistic head's result before the first step, the same for whoever works, and better after."""

import math
from typing import Any

import pytest
import torch
from makers import tiny_config
from torch import Tensor
from torch.nn import functional as F

from mmfast import MaskedViT
from mmfast.episodes import EpisodeResult, Episodes, evaluate_fresh
from mmfast.fewshot import LogisticRegression
from mmfast.peft import Adaptation, FewShotAdapter, adapter_parameters, evaluate_adapted, freeze_backbone

LABELS = torch.arange(3).repeat(8)


class Clips(torch.utils.data.Dataset):
    """A class is the way a bright square goes: right, down or nowhere; which frame is when says nothing."""

    def __init__(self, count: int = len(LABELS), broken: tuple[int, ...] = ()) -> None:
        self.count, self.broken = count, broken

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(row)
        video = 0.3 * torch.randn(3, 4, 32, 32, generator=draw)
        x, y = torch.randint(0, 8, (2,), generator=draw).tolist()
        label = int(LABELS[row])
        for t in range(4):
            dx, dy = (5 * t if label == 0 else 0), (5 * t if label == 1 else 0)
            video[:, t, y + dy : y + dy + 8, x + dx : x + dx + 8] += 2
        item: dict[str, Any] = {"clip_id": 100 + row, "label": label, "rgb": video}
        return item | ({"skipped": "cannot be read"} if row in self.broken else {})


def model(**changes: Any) -> MaskedViT:
    torch.manual_seed(0)
    return MaskedViT(tiny_config(**changes))


def small(**changes: Any) -> Episodes:
    options: dict[str, Any] = dict(n_way=3, k_shot=2, n_query=4, episodes=5, seed=5)
    return Episodes(LABELS, **{**options, **changes})


def state(net: MaskedViT) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in net.state_dict().items()}


def supports() -> tuple[Tensor, Tensor, Tensor]:
    items = [Clips()[row] for row in range(6)]
    return (
        torch.stack([i["rgb"] for i in items]),
        torch.tensor([i["clip_id"] for i in items]),
        torch.tensor([i["label"] for i in items]),
    )


# -- one episode ----------------------------------------------------------------------------------------------------


def test_without_steps_it_is_the_published_logistic_head() -> None:
    net, episodes = model(), small(episodes=20)
    fresh = evaluate_fresh(net, Clips(), episodes, 1, 0.5, 3, progress=False)
    adapted = evaluate_adapted(net, Clips(), episodes, 1, 0.5, 3, how=Adaptation(steps=0), progress=False)
    assert torch.equal(adapted.number, fresh.number)
    assert torch.equal(adapted.correct, fresh.correct)


def test_training_starts_at_the_optimum_of_its_own_objective() -> None:
    """Where the masks of the first step are those of the head's fit, the head has no gradient."""
    tuned = FewShotAdapter(model(), Adaptation(C=0.5, steps=0))
    video, ids, labels = supports()
    weight, bias = tuned.fit(video, ids, labels, 2, 0.0, 1)
    with torch.no_grad():
        features = tuned.model.encode(video).repeat_interleave(2, 0)
    weight, bias = weight.requires_grad_(), bias.requires_grad_()
    loss = F.cross_entropy(F.linear(features, weight, bias), labels.repeat_interleave(2))
    (loss + weight.square().sum() / (2 * 0.5 * len(labels))).backward()
    assert weight.grad is not None
    assert bias.grad is not None
    assert float(weight.grad.abs().max()) <= 1e-5
    assert float(bias.grad.abs().max()) <= 1e-5


def test_steps_lower_the_objective() -> None:
    video, ids, labels = supports()
    losses = []
    for steps in (0, 20):
        tuned = FewShotAdapter(model(), Adaptation(hidden=16, steps=steps, lr=3e-3))
        weight, bias = tuned.fit(video, ids, labels, 2, 0.0)
        with torch.no_grad():
            fit = F.cross_entropy(F.linear(tuned.model.encode(video), weight, bias), labels)
            losses.append(float(fit + weight.square().sum() / (2 * len(labels))))
    assert losses[1] < 0.8 * losses[0]


def test_only_adapters_and_head_change_and_each_fit_starts_anew() -> None:
    tuned = FewShotAdapter(model(), Adaptation(steps=3, lr=1e-3))
    video, ids, labels = supports()
    before = state(tuned.model)
    first = tuned.fit(video, ids, labels, 2, 0.5)
    moved = {name for name, t in tuned.model.state_dict().items() if not torch.equal(t, before[name])}
    assert moved <= set(adapter_parameters(tuned.model))
    assert moved
    tuned.fit(video.flip(0), ids, labels, 2, 0.5, seed=9)
    again = tuned.fit(video, ids, labels, 2, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_masks_are_drawn_anew_at_every_step() -> None:
    tuned, seen = FewShotAdapter(model(), Adaptation(steps=4)), []
    encode = tuned.model.encode
    tuned.model.encode = lambda video, pack: seen.append(pack.keep_idx.tolist()) or encode(video, pack)  # type: ignore[method-assign, assignment, func-returns-value]  # listens
    tuned.fit(*supports(), 1, 0.75)
    assert len(seen) == 5
    assert len({str(kept) for kept in seen}) > 2


def test_adapters_that_a_model_has_are_where_every_episode_starts() -> None:
    net = model(adapter_hidden=4, adapter_before=("mlp",))
    with torch.no_grad():
        for p in adapter_parameters(net).values():
            p.normal_(std=0.1)
    tuned = FewShotAdapter(net, Adaptation(steps=1))
    assert tuned.model.config == net.config
    tuned.fit(*supports())
    tuned.how = Adaptation(steps=0)
    tuned.fit(*supports())
    assert all(torch.equal(p, net.get_parameter(n)) for n, p in adapter_parameters(tuned.model).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adaptation_in_half_precision(dtype: torch.dtype) -> None:
    tuned = FewShotAdapter(model(), Adaptation(steps=3, lr=1e-3))
    weight, bias = tuned.fit(*supports(), 2, 0.5, 0, dtype)
    exact = FewShotAdapter(model(), Adaptation(steps=3, lr=1e-3)).fit(*supports(), 2, 0.5)
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight, exact[0], rtol=0.05, atol=0.02)
    torch.testing.assert_close(bias, exact[1], rtol=0.05, atol=0.02)


# -- many episodes --------------------------------------------------------------------------------------------------


def test_the_model_stays_as_it_is() -> None:
    net = model().train()
    before = state(net)
    evaluate_adapted(net, Clips(), small(episodes=2), 2, 0.5, how=Adaptation(steps=2), progress=False)
    assert net.training
    assert net.config.adapter_hidden == 0
    assert all(p.requires_grad for p in net.parameters())
    assert before.keys() == net.state_dict().keys()
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_shards_give_the_result_of_one() -> None:
    net, how = model(), Adaptation(steps=2)
    whole = evaluate_adapted(net, Clips(), small(), 2, 0.5, 1, how=how, progress=False)
    torch.rand(7)  # what else the process draws must not matter
    parts = [evaluate_adapted(net, Clips(), small().shard(r, 2), 2, 0.5, 1, how=how, progress=False) for r in (1, 0)]
    assert torch.equal(EpisodeResult.merge(parts).correct, whole.correct)


def test_adapters_learn_what_the_frozen_features_hide() -> None:
    """Random features of a ViT know little of motion; the adapters look along time."""
    net, episodes = model(), small(k_shot=4, n_query=4, episodes=3)
    how = Adaptation(hidden=32, before=("attn", "mlp"), steps=40, lr=1e-2)
    frozen = evaluate_adapted(net, Clips(), episodes, 2, 0.0, how=Adaptation(steps=0), progress=False)
    adapted = evaluate_adapted(net, Clips(), episodes, 2, 0.0, how=how, progress=False)
    gain, _ = adapted.difference(frozen)
    assert gain > 0.1, (frozen.mean, adapted.mean)


def test_paired_differences() -> None:
    number = torch.arange(4)
    a = EpisodeResult(number, torch.tensor([3, 4, 5, 4]), 5)
    b = EpisodeResult(number, torch.tensor([2, 4, 3, 3]), 5)
    mean, error = a.difference(b)
    gains = torch.tensor([0.2, 0.0, 0.4, 0.2])
    assert mean == pytest.approx(float(gains.mean()))
    assert error == pytest.approx(float(gains.std(correction=0)) / math.sqrt(4))
    with pytest.raises(ValueError, match="same episodes"):
        a.difference(EpisodeResult(number + 1, b.correct, 5))


# -- what it refuses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [{"steps": -1}, {"lr": 0.0}, {"lr": math.inf}, {"weight_decay": -1.0}, {"C": 0.0}, {"hidden": 0}, {"C": math.nan}],
    ids=str,
)
def test_bad_settings_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        Adaptation(**wrong)


def test_a_model_without_adapters_cannot_be_frozen_around_them() -> None:
    with pytest.raises(ValueError, match="no adapters"):
        freeze_backbone(model())


def test_adapters_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="hidden must be None or 4, as wide as the adapters the model has, got 8"):
        FewShotAdapter(model(adapter_hidden=4), Adaptation(hidden=8))


def test_another_kind_of_model_is_refused() -> None:
    with pytest.raises(TypeError, match="must be a MaskedViT, got Linear"):
        FewShotAdapter(torch.nn.Linear(2, 2))  # type: ignore[arg-type]  # what a caller may pass


@pytest.mark.parametrize(
    ("change", "message"),
    [({"views": 0}, "views must"), ({"mask_ratio": 1.0}, "mask_ratio must"), ({"modality": "flow"}, "modality must")],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_adapted(model(), Clips(), small(), progress=False, **change)


def test_every_clip_must_be_there() -> None:
    with pytest.raises(ValueError, match="that cannot be read"):
        evaluate_adapted(model(), Clips(broken=tuple(range(12))), small(), progress=False)
    with pytest.raises(ValueError, match="dataset must have 24 clips"):
        evaluate_adapted(model(), Clips(5), small(), progress=False)


def test_logistic_head_of_all_views_weighs_a_clip_as_one() -> None:
    tuned = FewShotAdapter(model(), Adaptation(steps=0))
    video, ids, labels = supports()
    weight, _ = tuned.fit(video, ids, labels, 3, 0.0)
    with torch.no_grad():
        once = LogisticRegression().fit(tuned.model.encode(video)[None], labels[None])
    torch.testing.assert_close(weight, once.weight[0].float(), rtol=1e-4, atol=1e-5)
