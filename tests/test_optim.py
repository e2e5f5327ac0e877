"""Parameter groups, the scaling rule, and both schedules, each against the published formula."""

import math
from typing import Any

import pytest
import torch
from makers import tiny_config
from torch import nn

from mmfast.optim import WarmupCosine, param_groups, scale_lr
from mmfast.vit import MaskedViT


def tiny(**overrides: Any) -> MaskedViT:
    return MaskedViT(tiny_config(**overrides))


class Autoencoder(nn.Module):
    """The names of a masked autoencoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = tiny(num_classes=0, fc_norm=False, final_norm=True)
        self.encoder_to_decoder = nn.Linear(64, 32, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 32))
        self.decoder = nn.Module()
        self.decoder.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def no_weight_decay(self) -> set[str]:
        return {"mask_token"}


def named(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Parameter name -> its group."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group for group in groups for p in group["params"]}


def scales(model: nn.Module, layer_decay: float = 0.5) -> dict[str, float]:
    return {n: g["lr_scale"] for n, g in named(model, param_groups(model, 1.0, layer_decay=layer_decay)).items()}


# -- groups ------------------------------------------------------------------------------------------------------------


def test_weights_decay_and_everything_else_does_not() -> None:
    model = tiny(init_values=0.1)
    group_of = named(model, param_groups(model, weight_decay=0.1))
    assert group_of.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        expected = 0.1 if parameter.ndim > 1 else 0.0
        assert group_of[name]["weight_decay"] == expected, name


def test_a_bias_of_two_dimensions_does_not_decay() -> None:
    model = nn.Module()
    model.bias = nn.Parameter(torch.zeros(2, 2))
    model.weight = nn.Parameter(torch.zeros(2, 2))
    assert {g["name"]: g["weight_decay"] for g in param_groups(model)} == {"no_decay": 0.0, "decay": 0.05}


@pytest.mark.parametrize("depth", [0, 1], ids=["itself", "nested"])
def test_names_in_no_weight_decay_do_not_decay(depth: int) -> None:
    inner = Autoencoder()
    model: nn.Module = nn.ModuleDict({"model": inner}) if depth else inner
    prefix = "model." if depth else ""
    group_of = named(model, param_groups(model))
    assert group_of[f"{prefix}mask_token"]["weight_decay"] == 0
    assert group_of[f"{prefix}encoder_to_decoder.weight"]["weight_decay"] == 0.05


def test_frozen_parameters_are_left_out() -> None:
    model = tiny()
    model.blocks[0].requires_grad_(False)
    assert not [n for n in named(model, param_groups(model)) if n.startswith("blocks.0.")]


def test_a_shared_parameter_is_listed_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    torch.optim.AdamW(param_groups(model), lr=1.0)
    assert sum(len(g["params"]) for g in param_groups(model)) == 3


def test_layer_decay_of_a_vit() -> None:
    scale_of = scales(tiny(final_norm=True))
    for name, scale in scale_of.items():
        layer = 0 if name.startswith("patch_embed") else int(name.split(".")[1]) + 1 if "blocks" in name else 3
        assert scale == 0.5 ** (3 - layer), name


def test_layer_decay_of_an_autoencoder_counts_its_decoder_last() -> None:
    scale_of = scales(Autoencoder())
    assert scale_of["encoder.patch_embed.proj.weight"] == 0.125
    assert scale_of["encoder.blocks.1.attn.qkv.weight"] == 0.5
    for name in ("encoder.norm.weight", "mask_token", "encoder_to_decoder.weight", "decoder.blocks.0.weight"):
        assert scale_of[name] == 1, name


def test_groups_carry_their_own_lr() -> None:
    groups = param_groups(tiny(), lr=0.3, layer_decay=0.5)
    assert {g["name"]: g["lr"] for g in groups}["layer_1_decay"] == pytest.approx(0.3 * 0.25)
    assert all(g["lr"] == pytest.approx(0.3 * g["lr_scale"]) for g in groups)
    optimizer = torch.optim.AdamW(groups, lr=7.0)
    assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in groups]


def test_without_lr_the_optimiser_sets_it() -> None:
    assert {g["lr"] for g in torch.optim.AdamW(param_groups(tiny()), lr=0.7).param_groups} == {0.7}


def test_two_transformers_of_different_depth_have_their_own_layers() -> None:
    model = nn.ModuleDict({"a": tiny(depth=1), "b": tiny(depth=3), "head": nn.Linear(2, 2)})
    scale_of = scales(model)
    assert (scale_of["a.blocks.0.mlp.fc1.weight"], scale_of["b.blocks.0.mlp.fc1.weight"]) == (0.5, 0.125)
    assert scale_of["head.weight"] == 1
    names = [g["name"] for g in param_groups(model, 1.0, layer_decay=0.5)]
    assert len(set(names)) == len(names)


def test_a_frozen_transformer_has_no_layers() -> None:
    model = nn.ModuleDict({"student": tiny(depth=2), "teacher": tiny(depth=4)})
    model["teacher"].requires_grad_(False)
    assert "layer_1_decay" in {g["name"] for g in param_groups(model, 1.0, layer_decay=0.5)}


class Wrapped(nn.Module):
    """As DDP holds a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize(
    "wrap", [Wrapped, torch.compile, lambda m: torch.compile(Wrapped(m))], ids=["ddp", "compile", "both"]
)
def test_wrappers_change_no_group(wrap: Any) -> None:
    model = Autoencoder()
    plain = param_groups(model, 1.0, layer_decay=0.5)
    wrapped = param_groups(wrap(model), 1.0, layer_decay=0.5)
    assert [g["name"] for g in wrapped] == [g["name"] for g in plain]
    for one, other in zip(wrapped, plain, strict=True):
        assert {**one, "params": 0} == {**other, "params": 0}
        assert all(p is q for p, q in zip(one["params"], other["params"], strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(lr=1.0, layer_decay=0.5), "layer_decay needs a model with `blocks`"),
        (dict(layer_decay=0.5), "lr must be given with layer_decay"),
        (dict(lr=1.0, layer_decay=0.0), r"layer_decay must lie in \(0, 1\], got 0.0"),
        (dict(weight_decay=-1.0), "weight_decay must be finite and at least 0, got -1.0"),
    ],
    ids=["no_blocks", "no_lr", "layer_decay", "weight_decay"],
)
def test_param_groups_says_what_is_wrong(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        param_groups(nn.Linear(2, 2), **arguments)


def test_model_must_be_a_module() -> None:
    with pytest.raises(TypeError, match="model must be an nn.Module, got dict"):
        param_groups({})


def test_scale_lr_gives_the_published_rates() -> None:
    """MM-CDFSL: 1.5e-4 at 48 * 2 clips, 2e-3 at 64 * 2."""
    assert scale_lr(1.5e-4, 48 * 2) == pytest.approx(5.625e-5)
    assert scale_lr(2e-3, 64 * 2) == pytest.approx(1e-3)
    with pytest.raises(ValueError, match="batch_size and base_batch must be at least 1, got 0"):
        scale_lr(1.0, 0)


# -- schedules ---------------------------------------------------------------------------------------------------------


def optimizer_of(*lrs: float, scales: tuple[float, ...] = ()) -> torch.optim.Optimizer:
    groups = [{"params": [nn.Parameter(torch.zeros(2))], "lr": lr} for lr in lrs]
    for group, scale in zip(groups, scales, strict=False):
        group["lr_scale"] = scale
    return torch.optim.SGD(groups)


def run(schedule: WarmupCosine, steps: int) -> list[float]:
    """The lr of the first group at each step, and after the last."""
    lrs = []
    for _ in range(steps):
        lrs.append(schedule.optimizer.param_groups[0]["lr"])
        schedule.optimizer.step()
        schedule.step()
    return [*lrs, schedule.optimizer.param_groups[0]["lr"]]


@pytest.mark.parametrize(("total", "warmup"), [(20, 5), (20, 0), (3, 2), (7, 1)])
def test_the_lrs_are_videomaes_table(total: int, warmup: int) -> None:
    start, peak, low = 1e-6, 1.5e-4, 1e-5
    rising = torch.linspace(start, peak, warmup, dtype=torch.float64).tolist()
    falling = [low + 0.5 * (peak - low) * (1 + math.cos(math.pi * i / (total - warmup))) for i in range(total - warmup)]
    lrs = run(WarmupCosine(optimizer_of(peak), total, warmup, min_lr=low, warmup_lr=start), total)
    assert lrs[:-1] == pytest.approx(rising + falling, rel=1e-12)


def test_the_lr_ends_at_min_lr_exactly_and_stays() -> None:
    lrs = run(WarmupCosine(optimizer_of(1.5e-4), 20, 5, min_lr=1e-5), 25)
    assert lrs[20:] == [1e-5] * 6


@pytest.mark.parametrize(("warmup", "above"), [(10, 0.024), (5, 0.006)], ids=["pretraining", "distillation"])
def test_the_released_schedule_ends_above_min_lr(warmup: int, above: float) -> None:
    per_epoch, peak, low = 3, 1e-3, 5e-7
    schedule = WarmupCosine(optimizer_of(peak), 100 * per_epoch, warmup * per_epoch, min_lr=low, reference=True)
    end = run(schedule, 100 * per_epoch)[-1]
    assert round((end - low) / (peak - low), 3) == above


def test_the_released_schedule_is_timms() -> None:
    """timm 0.4.12: t * (lr - warmup_lr) / warmup_t, then a cosine of t - warmup_t over t_initial = all steps."""
    total, warmup, start, peak, low = 12, 4, 1e-6, 1e-3, 5e-6
    expected = [start + t * (peak - start) / warmup for t in range(warmup)]
    expected += [
        low + 0.5 * (peak - low) * (1 + math.cos(math.pi * (t - warmup) / total)) for t in range(warmup, total + 1)
    ]
    schedule = WarmupCosine(optimizer_of(peak), total, warmup, min_lr=low, warmup_lr=start, reference=True)
    assert run(schedule, total) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("reference", [False, True], ids=["table", "reference"])
def test_every_group_keeps_its_lr_scale_all_along(reference: bool) -> None:
    optimizer = optimizer_of(1e-3, 0.25e-3, scales=(1.0, 0.25))
    schedule = WarmupCosine(optimizer, 9, 3, min_lr=1e-5, warmup_lr=1e-6, reference=reference)
    for _ in range(10):
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert second == pytest.approx(0.25 * first, rel=1e-12)
        optimizer.step()
        schedule.step()


def test_lrs_not_yet_scaled_are_refused() -> None:
    with pytest.raises(ValueError, match="each group's lr must contain its lr_scale"):
        WarmupCosine(optimizer_of(1e-3, 1e-3, scales=(1.0, 0.25)), 9, 3, min_lr=0.0)


@pytest.mark.parametrize("optimizer_first", [True, False])
def test_training_goes_on_from_a_state_dict(optimizer_first: bool) -> None:
    whole = run(WarmupCosine(optimizer_of(1e-3), 9, 3, min_lr=1e-5), 9)
    before = WarmupCosine(optimizer_of(1e-3), 9, 3, min_lr=1e-5)
    run(before, 5)
    saved, saved_optimizer = before.state_dict(), before.optimizer.state_dict()
    after = WarmupCosine(optimizer_of(1e-3), 9, 3, min_lr=1e-5)
    if optimizer_first:
        after.optimizer.load_state_dict(saved_optimizer)
    after.load_state_dict(saved)
    if not optimizer_first:
        after.optimizer.load_state_dict(saved_optimizer)
    assert run(after, 4) == whole[5:]


def test_state_dict_is_plain_data() -> None:
    saved = WarmupCosine(optimizer_of(1e-3), 9, 3, min_lr=1e-5).state_dict()
    assert all(isinstance(value, (int, float, bool, list, type(None))) for value in saved.values()), saved


def test_an_lr_tensor_is_written_in_place() -> None:
    lr = torch.tensor(1e-3, dtype=torch.float64)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2))], lr=lr, foreach=False)
    schedule = WarmupCosine(optimizer, 9, 3, min_lr=1e-5)
    schedule.load_state_dict(schedule.state_dict())
    lrs = run(schedule, 9)
    assert optimizer.param_groups[0]["lr"] is lr
    assert float(lrs[-1]) == 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(total_steps=3, warmup_steps=3), "total_steps must be above warmup_steps 3, got 3"),
        (dict(warmup_steps=-1), "warmup_steps must be at least 0, got -1"),
        (dict(min_lr=float("nan")), "min_lr must be finite and at least 0, got nan"),
        (dict(warmup_lr=-1.0), "warmup_lr must be finite and at least 0, got -1.0"),
        (dict(min_lr=0.1), "min_lr must not be above the optimizer's lr 0.001, got 0.1"),
    ],
    ids=["total_steps", "warmup_steps", "min_lr", "warmup_lr", "min_above_lr"],
)
def test_warmup_cosine_says_what_is_wrong(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WarmupCosine(optimizer_of(1e-3), **{"total_steps": 9, "warmup_steps": 3, "min_lr": 0.0, **arguments})
