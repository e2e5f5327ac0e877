"""Multimodal distillation: the loss against its formula, what stays frozen, and what a state dict holds."""

import copy
import math

import pytest
import torch
from distill_makers import GRID, clips, make, masks
from torch import Tensor, nn
from torch.nn import functional as F

from mmfast.distill import CrossModalTranslate, ModalityWeights, MultimodalDistillation
from mmfast.masks import sample_pack
from mmfast.optim import param_groups


def formula(model: MultimodalDistillation, videos: dict[str, Tensor], mask: Tensor, modality: str) -> Tensor:
    """mean((MLP_m(f_student) - f_m)^2), from separate forwards."""
    first, _, second = model.translate.get_submodule(f"mlp_to_{modality}")
    own = model.student.encode(videos["rgb"], mask)
    said = F.linear(F.relu(F.linear(own, first.weight, first.bias)), second.weight, second.bias)
    with torch.no_grad():
        target = model.teachers[modality].encode(videos[modality], mask)
    return (said - target).square().mean()


# -- the loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modalities", [("flow", "rgb", "pose"), ("pose",), ("rgb", "flow")], ids="-".join)
@pytest.mark.parametrize("views", [1, 2])
def test_the_loss_is_the_published_formula(modalities: tuple[str, ...], views: int) -> None:
    model, videos, mask = make(*modalities).double(), clips(dtype=torch.float64), masks(views=views)
    out = model(videos, mask)
    assert out.keys() == {"total", "features", *(f"mse_{m}" for m in modalities)}
    for modality in modalities:
        torch.testing.assert_close(out[f"mse_{modality}"], formula(model, videos, mask, modality))
    torch.testing.assert_close(out["total"], sum(formula(model, videos, mask, m) for m in modalities))
    torch.testing.assert_close(out["features"], model.student.encode(videos["rgb"], mask))


def test_gradients_are_those_of_the_formula() -> None:
    model, videos, mask = make().double(), clips(dtype=torch.float64), masks()
    learnt = {n: p for n, p in model.named_parameters() if p.requires_grad}
    got = torch.autograd.grad(model(videos, mask)["total"], list(learnt.values()))
    expected = torch.autograd.grad(sum(formula(model, videos, mask, m) for m in model.teachers), list(learnt.values()))
    for name, one, other in zip(learnt, got, expected, strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}")
        assert one.abs().max() > 0, name


def test_a_pack_gives_what_its_masks_give() -> None:
    model, videos = make(), clips()
    pack = sample_pack(3, 1, GRID, 0.5, seed=1)
    one, other = model(videos, pack), model(videos, masks())
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_no_mask_keeps_every_token() -> None:
    model, videos = make(), clips()
    nothing = torch.zeros(3, 8, dtype=torch.bool)
    torch.testing.assert_close(model(videos, None)["total"], model(videos, nothing)["total"])


def test_the_mask_is_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmfast import vit as vit_module

    model, calls = make(), []
    pack_masks = vit_module.pack_masks
    monkeypatch.setattr(vit_module, "pack_masks", lambda mask: calls.append(1) or pack_masks(mask))
    model(clips(), masks())
    assert len(calls) == 1


def test_clips_without_a_teacher_are_not_looked_at() -> None:
    model, videos = make("flow"), clips()
    broken = {**videos, "pose": torch.zeros(0)}
    assert torch.equal(model(broken, masks())["total"], model(videos, masks())["total"])


def test_the_loss_is_taken_in_fp32_under_autocast() -> None:
    model, videos = make(), clips()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(videos, masks())
    assert out["total"].dtype == torch.float32
    torch.testing.assert_close(out["total"], model(videos, masks())["total"], rtol=3e-2, atol=0)


def test_compiles_whole() -> None:
    model, videos = make(), clips()
    pack = sample_pack(3, 1, GRID, 0.5, seed=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out, expected = compiled(videos, pack), model(videos, pack)
    torch.testing.assert_close(out["total"], expected["total"])
    out["total"].backward()
    assert model.student.patch_embed.proj.weight.grad is not None


# -- features from a cache ---------------------------------------------------------------------------------------------


def cached(model: MultimodalDistillation, modality: str, views: int = 1) -> Tensor:
    with torch.no_grad():
        return model.teachers[modality].encode(clips()[modality], masks(views=views))


@pytest.mark.parametrize("views", [1, 2])
def test_features_stand_in_for_a_teacher_and_its_clips(views: int) -> None:
    model, mask, videos = make(), masks(views=views), clips()
    expected = model(videos, mask)
    without = MultimodalDistillation(
        model.student, {m: t for m, t in model.teachers.items() if m != "pose"}, model.translate
    )
    del videos["pose"]
    out = without(videos, mask, features={"pose": cached(model, "pose", views)})
    assert all(torch.equal(out[name], expected[name]) for name in expected)


def test_a_teacher_whose_features_are_given_does_not_run() -> None:
    model, calls = make(), []
    model.teachers["flow"].register_forward_pre_hook(lambda *_: calls.append(1))
    model.teachers["flow"].encode = lambda *_: pytest.fail("the teacher ran")
    model(clips(), masks(), features={"flow": cached(make(), "flow")})


def test_all_features_may_come_from_a_cache() -> None:
    model = make()
    given = {m: cached(model, m) for m in model.teachers}
    alone = MultimodalDistillation(model.student, {}, model.translate)
    out = alone({"rgb": clips()["rgb"]}, masks(), features=given)
    assert torch.equal(out["total"], model(clips(), masks())["total"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_features_of_inference_mode_train(dtype: torch.dtype) -> None:
    model, exact = make("rgb"), cached(make("rgb"), "rgb")
    with torch.inference_mode():
        kept = exact.to(dtype, copy=True)
    total = model(clips(), masks(), features={"rgb": kept})["total"]
    total.backward()
    torch.testing.assert_close(total, model(clips(), masks())["total"], rtol=1e-2, atol=0)


def test_no_gradient_goes_to_given_features() -> None:
    model = make("rgb")
    given = cached(model, "rgb").requires_grad_()
    model(clips(), masks(), features={"rgb": given})["total"].backward()
    assert given.grad is None


# -- frozen teachers ---------------------------------------------------------------------------------------------------


def test_teachers_stay_in_eval_mode() -> None:
    model = make()
    nn.Sequential(model).train()
    assert model.student.training
    assert not any(module.training for module in model.teachers.modules())


def test_teachers_do_not_change() -> None:
    model = make()
    before = copy.deepcopy(model.teachers.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model.train()(clips(), masks())["total"].backward()
    optimizer.step()
    assert all(torch.equal(t, before[n]) for n, t in model.teachers.state_dict().items())
    assert all(p.grad is None for p in model.teachers.parameters())


def test_groups_hold_what_trains() -> None:
    model = make(weights=ModalityWeights(learnable=True))
    groups = param_groups(model, 1.0, layer_decay=0.5)
    held = {id(p): g for g in groups for p in g["params"]}
    expected = [*model.student.parameters(), *model.translate.parameters(), *model.weights.parameters()]
    assert held.keys() == {id(p) for p in expected}
    assert held[id(model.student.blocks[0].mlp.fc1.weight)]["lr_scale"] == 0.25
    assert held[id(model.weights.log_variance)]["weight_decay"] == 0


def test_training_learns() -> None:
    model, videos, mask = make().train(), clips(), masks()
    optimizer = torch.optim.AdamW(param_groups(model), lr=1e-2)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        total = model(videos, mask)["total"]
        total.backward()
        optimizer.step()
        losses.append(float(total.detach()))
    assert losses[-1] < 0.8 * losses[0], losses


def test_checkpointing_of_blocks_gives_the_same_gradients() -> None:
    model, videos, mask = make().double(), clips(dtype=torch.float64), masks()
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(videos, mask)["total"].backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert model.student.grad_checkpointing
    torch.testing.assert_close(grads[0], grads[1])


# -- state dicts -------------------------------------------------------------------------------------------------------


def test_a_state_dict_has_no_teachers_and_loads_strictly() -> None:
    model, other = make(weights=ModalityWeights(learnable=True)), make(weights=ModalityWeights(learnable=True))
    for parameter in other.parameters():
        nn.init.constant_(parameter, 0.25)
    state = nn.ModuleDict({"model": model}).state_dict()
    assert {name.split(".")[1] for name in state} == {"student", "translate", "weights"}
    nn.ModuleDict({"model": other}).load_state_dict(state)
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in other.state_dict().items())
    assert all(bool((p == 0.25).all()) for p in other.teachers.parameters())


def test_a_state_dict_with_teachers_loads_them() -> None:
    model, other = make(), make()
    for parameter in other.parameters():
        nn.init.constant_(parameter, 0.25)
    state = model.state_dict() | model.teachers.state_dict(prefix="teachers.")
    other.load_state_dict(state)
    assert torch.equal(other(clips(), masks())["total"], model(clips(), masks())["total"])


def test_a_strict_load_still_sees_what_is_missing() -> None:
    model = make()
    state = model.state_dict()
    del state["student.fc_norm.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"student.fc_norm.weight\""):
        model.load_state_dict(state | {})


def test_a_copy_is_whole() -> None:
    model = copy.deepcopy(make())
    model.load_state_dict(model.state_dict())
    assert not [name for name in model.state_dict() if name.startswith("teachers.")]


# -- translate and weights ---------------------------------------------------------------------------------------------


def test_translate_has_the_published_names_and_size() -> None:
    translate = CrossModalTranslate()
    assert sum(p.numel() for p in translate.parameters()) == 887_040
    names = {f"mlp_to_{m}.{n}.{k}" for m in ("flow", "rgb", "pose") for n in (0, 2) for k in ("weight", "bias")}
    assert set(translate.state_dict()) == names


def test_hidden_sets_the_inner_width() -> None:
    translate = CrossModalTranslate(8, ("rgb",), hidden=3)
    assert [tuple(p.shape) for p in translate.parameters()] == [(3, 8), (3,), (8, 3), (8,)]
    assert translate(torch.ones(2, 8))["rgb"].shape == (2, 8)


def test_fixed_weights_multiply() -> None:
    weights = ModalityWeights(init={"flow": 0.5, "rgb": 2.0, "pose": 0.0})
    losses = {"rgb": torch.tensor(3.0), "flow": torch.tensor(5.0), "pose": torch.tensor(7.0)}
    assert weights(losses) == 8.5
    assert not weights.state_dict()


def test_learnt_weights_start_as_fixed_ones_and_balance() -> None:
    """The best s_m is log L_m, where exp(-s_m) L_m + s_m = 1 + log L_m."""
    losses = {"rgb": torch.tensor(3.0), "flow": torch.tensor(0.2)}
    weights = ModalityWeights(losses, learnable=True, init={"rgb": 2.0, "flow": 0.5})
    assert weights(losses).item() == pytest.approx(2 * 3 - math.log(2) + 0.5 * 0.2 + math.log(2), rel=1e-6)
    optimizer = torch.optim.Adam(weights.parameters(), lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        weights(losses).backward()
        optimizer.step()
    assert weights.log_variance is not None
    torch.testing.assert_close(
        weights.log_variance.detach(), torch.tensor([math.log(3.0), math.log(0.2)]), rtol=1e-3, atol=1e-3
    )


def test_weights_enter_the_total() -> None:
    model = make(weights=ModalityWeights(init={"flow": 0.5, "rgb": 2.0, "pose": 3.0}))
    out = model(clips(), masks())
    torch.testing.assert_close(out["total"], 0.5 * out["mse_flow"] + 2 * out["mse_rgb"] + 3 * out["mse_pose"])
