"""Steps that are not finite: what they leave alone, what they count, and when they raise."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmfast.guard import StepGuard
from mmfast.optim import WarmupCosine

NAN, INF = float("nan"), float("inf")


class Rig:
    """One linear layer, AdamW with momentum already, and a guard."""

    def __init__(self, scaler: Any = None, scheduled: bool = False, device: str = "cpu", **options: Any) -> None:
        torch.manual_seed(0)
        self.device = device
        self.model = nn.Linear(3, 2).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.schedule = WarmupCosine(self.optimizer, 100, 10, min_lr=0.0) if scheduled else None
        self.guard = StepGuard(self.optimizer, scaler=scaler, scheduler=self.schedule, **options)

    def loss(self, factor: float = 1.0) -> Tensor:
        return self.model(torch.ones(4, 3, device=self.device)).square().mean() * factor

    def state(self) -> list[Tensor]:
        """Parameters and the optimiser's state, cloned."""
        own = [t for s in self.optimizer.state_dict()["state"].values() for t in s.values()]
        return [t.detach().clone() for t in (*self.model.parameters(), *own)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def skip(rig: Rig, loss: Tensor | None = None) -> None:
    with pytest.warns(RuntimeWarning, match="left out"):
        assert rig.guard.step(rig.loss(NAN) if loss is None else loss) is False


def poison(parameter: nn.Parameter, value: float = NAN) -> Callable[[], None]:
    """Make every gradient of it bad, while the loss stays finite."""
    return parameter.register_hook(lambda grad: grad * value).remove


def scaler(**options: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", **options)


def test_a_good_step_is_the_ordinary_one() -> None:
    rig, plain = Rig(), Rig()
    for _ in range(3):
        assert rig.guard.step(rig.loss()) is True
        plain.loss().backward()
        plain.optimizer.step()
        plain.optimizer.zero_grad()
    assert same(rig.state(), plain.state())
    assert all(p.grad is None for p in rig.model.parameters())
    assert rig.guard.state_dict()["steps"] == 3


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaler"])
def test_a_bad_loss_changes_nothing(value: float, scaled: bool) -> None:
    rig = Rig(scaler() if scaled else None)
    rig.guard.step(rig.loss())
    before = rig.state()
    scale = rig.guard.scaler.get_scale() if rig.guard.scaler else None
    with pytest.warns(RuntimeWarning, match=rf"step 2 left out: loss {value} \(1 so far\)"):
        assert rig.guard.step(rig.loss(value)) is False
    assert same(rig.state(), before)
    assert (rig.guard.skipped, rig.guard.overflowed) == (1, 0)
    assert all(p.grad is None for p in rig.model.parameters())
    assert scale == (rig.guard.scaler.get_scale() if rig.guard.scaler else None)
    assert rig.guard.step(rig.loss()) is True


def test_a_bad_loss_in_host_memory_has_no_backward() -> None:
    rig, calls = Rig(), []
    rig.model.weight.register_hook(lambda grad: calls.append(1))
    skip(rig)
    assert not calls


def test_gradients_that_lie_there_are_dropped_with_a_bad_loss() -> None:
    rig = Rig()
    rig.loss().backward()
    skip(rig)
    assert all(p.grad is None for p in rig.model.parameters())


def test_gradients_of_a_micro_batch_are_added_to() -> None:
    rig, plain = Rig(), Rig()
    (rig.loss() / 2).backward()
    rig.guard.step(rig.loss() / 2)
    plain.guard.step(plain.loss())
    assert same(rig.state(), plain.state())


@pytest.mark.parametrize("value", [NAN, INF])
def test_bad_gradients_without_a_scaler_are_left_out(value: float) -> None:
    rig = Rig(clip_grad=1.0)
    rig.guard.step(rig.loss())
    before = rig.state()
    remove = poison(rig.model.weight, value)
    with pytest.warns(RuntimeWarning, match="gradients that are not finite at loss"):
        assert rig.guard.step(rig.loss()) is False
    assert same(rig.state(), before)
    assert (rig.guard.skipped, rig.guard.overflowed) == (1, 0)
    remove()
    assert rig.guard.step(rig.loss()) is True


def test_bad_gradients_under_a_scaler_switched_off_are_left_out() -> None:
    rig = Rig(scaler(enabled=False))
    poison(rig.model.weight)
    skip(rig, rig.loss())
    assert (rig.guard.skipped, rig.guard.overflowed) == (1, 0)


# -- the scaler --------------------------------------------------------------------------------------------------------


def test_overflow_of_fp16_is_the_scalers_work() -> None:
    """A real one: fp16 autocast, and a scale that no fp16 gradient survives."""
    rig = Rig(scaler(init_scale=2.0**24), scheduled=True)
    before, lr = rig.state(), rig.optimizer.param_groups[0]["lr"]
    with torch.autocast("cpu", dtype=torch.float16):
        loss = rig.model(torch.ones(4, 3)).float().square().sum()
    assert loss.isfinite()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rig.guard.step(loss) is False
    assert rig.guard.scaler is not None
    assert rig.guard.scaler.get_scale() == 2.0**23
    assert same(rig.state(), before)
    assert (rig.guard.skipped, rig.guard.overflowed) == (0, 1)
    assert rig.optimizer.param_groups[0]["lr"] == lr
    assert all(p.grad is None for p in rig.model.parameters())


def test_the_scaler_finds_a_scale_that_works() -> None:
    rig = Rig(scaler(init_scale=2.0**24))
    moved = []
    for _ in range(20):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = rig.model(torch.ones(4, 3)).float().square().sum()
        moved.append(rig.guard.step(loss))
    assert moved[0] is False
    assert moved[-5:] == [True] * 5
    assert rig.guard.overflowed == moved.count(False)


def test_a_scaled_step_is_the_scalers_own() -> None:
    rig, plain = Rig(scaler(growth_interval=2), clip_grad=0.5), Rig()
    own = scaler(growth_interval=2)
    for _ in range(5):
        rig.guard.step(rig.loss())
        own.scale(plain.loss()).backward()
        own.unscale_(plain.optimizer)
        torch.nn.utils.clip_grad_norm_(plain.model.parameters(), 0.5)
        own.step(plain.optimizer)
        own.update()
        plain.optimizer.zero_grad()
    assert same(rig.state(), plain.state())
    assert rig.guard.scaler is not None
    assert rig.guard.scaler.state_dict() == own.state_dict()


def test_overflow_without_end_raises() -> None:
    rig = Rig(scaler(), patience=2)
    poison(rig.model.weight)
    for _ in range(41):
        rig.guard.step(rig.loss())
    with pytest.raises(FloatingPointError, match="step 42: gradients overflowed 42 times in a row, 42 in all"):
        rig.guard.step(rig.loss())


# -- clipping ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaler"])
def test_the_norm_that_is_clipped_is_of_unscaled_gradients(scaled: bool) -> None:
    rig, plain = Rig(scaler() if scaled else None, clip_grad=0.1), Rig()
    seen: list[list[Tensor]] = []
    hook = lambda optimizer, *_: seen.append([p.grad.clone() for p in optimizer.param_groups[0]["params"]])
    for one in (rig, plain):
        one.optimizer.register_step_pre_hook(hook)
    rig.guard.step(rig.loss())
    plain.loss().backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.model.parameters(), 0.1)
    plain.optimizer.step()
    assert norm > 0.1
    assert rig.guard.grad_norm is not None
    torch.testing.assert_close(rig.guard.grad_norm, norm)
    torch.testing.assert_close(seen[0], seen[1])


# -- the schedule ------------------------------------------------------------------------------------------------------


def test_the_schedule_ends_on_time_however_many_steps_are_left_out() -> None:
    rig, lrs = Rig(scheduled=True), []
    with warnings.catch_warnings():
        # torch's own about a schedule that moves before the optimiser must not be among them
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="step .* left out", category=RuntimeWarning)
        for step in range(100):
            lrs.append(rig.optimizer.param_groups[0]["lr"])
            rig.guard.step(rig.loss(NAN if step % 3 == 0 else 1.0))
    assert rig.guard.skipped == 34
    assert rig.optimizer.param_groups[0]["lr"] == 0.0
    assert lrs == sorted(lrs[:10]) + sorted(lrs[10:], reverse=True)


# -- patience ----------------------------------------------------------------------------------------------------------


def test_patience_counts_steps_in_a_row() -> None:
    rig = Rig(patience=3)
    for _ in range(2):
        skip(rig)
        skip(rig)
        rig.guard.step(rig.loss())
    skip(rig)
    skip(rig)
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(FloatingPointError, match="step 9 has loss nan: 3 steps left out in a row, 7 in all"),
    ):
        rig.guard.step(rig.loss(NAN))


def test_counters_go_on_from_a_state_dict() -> None:
    rig = Rig(patience=2)
    skip(rig)
    fresh = Rig(patience=2)
    fresh.guard.load_state_dict(rig.guard.state_dict())
    with pytest.warns(RuntimeWarning), pytest.raises(FloatingPointError, match="step 2 .* 2 in all"):
        fresh.guard.step(fresh.loss(NAN))


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(clip_grad=0.0), "clip_grad must be above 0, or None, got 0.0"),
        (dict(patience=0), "patience must be at least 1, got 0"),
    ],
    ids=["clip_grad", "patience"],
)
def test_guard_says_what_is_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rig(**options)


def test_loss_must_be_one_number() -> None:
    rig = Rig()
    with pytest.raises(ValueError, match=r"loss must have one element, got shape \(2,\)"):
        rig.guard.step(torch.ones(2))
    with pytest.raises(TypeError, match="loss must be a tensor, got float"):
        rig.guard.step(math.pi)


def test_state_dict_must_be_whole() -> None:
    with pytest.raises(ValueError, match="state_dict lacks skipped, "):
        Rig().guard.load_state_dict({"steps": 1})


# -- a device ----------------------------------------------------------------------------------------------------------


def waits(run: Callable[[], Any]) -> int:
    """How often the host waited for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)


@pytest.mark.gpu
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaler"])
def test_a_step_waits_for_the_device_once(scaled: bool) -> None:
    rig = Rig(torch.amp.GradScaler("cuda") if scaled else None, scheduled=True, device="cuda", clip_grad=1.0)
    rig.guard.step(rig.loss())
    loss = rig.loss()
    assert waits(lambda: rig.guard.step(loss)) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaler"])
def test_a_bad_loss_on_a_device_changes_nothing(scaled: bool) -> None:
    """Its backward has run by then: nothing of it stays, in the scaler neither."""
    rig = Rig(torch.amp.GradScaler("cuda") if scaled else None, device="cuda")
    rig.guard.step(rig.loss())
    before = rig.state()
    with pytest.warns(RuntimeWarning, match="step 2 left out: loss nan"):
        assert rig.guard.step(rig.loss(NAN)) is False
    assert same(rig.state(), before)
    assert rig.guard.scaler is None or rig.guard.scaler.get_scale() == 2.0**16
    assert rig.guard.step(rig.loss()) is True
