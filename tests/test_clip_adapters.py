"""Adapters in CLIP's towers: where they stand, full and masked, trained, switched off, and named as M2-CLIP names them."""

from typing import Any

import pytest
import torch
from clip_makers import clips, make, texts
from numerics import relative_error
from plain import part
from plain_clip import image_features, text_features

from mmfast import CLIP, CLIPConfig, random_masks, sample_pack, tube_masks
from mmfast.clip_blocks import AdapterPlacement

TOLERANCE = 1e-5
GRID = (4, 3, 3)
HALVES: list[tuple[str, ...]] = [("attn",), ("mlp",), ("attn", "mlp")]


def ted(before: tuple[str, ...] = ("attn", "mlp"), layers: tuple[int, ...] | None = None) -> AdapterPlacement:
    return AdapterPlacement(layers, before, 24, "ted")


def dead(name: str) -> bool:
    """The branch over space before the last MLP: cells alone read it, and only the class tokens leave the tower."""
    return name.startswith("visual.transformer.resblocks.2.adapter_pre_mlp.offset_adapter.")


def expected(model: CLIP, video: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    return image_features(model.config, part(model.state_dict(), "visual."), video, mask)


@pytest.mark.parametrize("masked", [False, True], ids=["full", "tube"])
@pytest.mark.parametrize("before", HALVES, ids="-".join)
def test_ted_adapters_in_the_vision_tower(before: tuple[str, ...], masked: bool) -> None:
    model, video = make(vision_adapters=ted(before)), clips()
    mask = tube_masks(2, 1, GRID, 0.5)[:, 0] if masked else None
    with torch.no_grad():
        assert relative_error(model.encode_image(video, mask), expected(model, video, mask)) <= TOLERANCE


@pytest.mark.parametrize("layers", [(0,), (2,), (0, 2)])
def test_ted_adapters_in_some_blocks(layers: tuple[int, ...]) -> None:
    model, video = make(vision_adapters=ted(("mlp",), layers)), clips()
    with torch.no_grad():
        assert relative_error(model.encode_image(video), expected(model, video)) <= TOLERANCE


@pytest.mark.parametrize("kind", ["bool", "pack"])
def test_views_with_ted_adapters(kind: str) -> None:
    model, video, masks = make(vision_adapters=ted()), clips(), tube_masks(2, 3, GRID, 0.5, seed=7)
    with torch.no_grad():
        given: Any = masks if kind == "bool" else sample_pack(2, 3, GRID, 0.5, seed=7)
        got = model.encode_image(video, given).view(2, 3, 4, -1)
        for view in range(3):
            assert relative_error(got[:, view], expected(model, video, masks[:, view])) <= TOLERANCE


def test_views_of_different_ratios_with_ted_adapters() -> None:
    model, video = make(vision_adapters=ted()), clips()
    masks = torch.stack([tube_masks(2, 1, GRID, ratio)[:, 0] for ratio in (0.3, 0.7)], 1)
    with torch.no_grad():
        got = model.encode_image(video, masks)
        for view in range(2):
            assert relative_error(got[:, view], expected(model, video, masks[:, view])) <= TOLERANCE


def test_a_clip_does_not_feel_its_neighbour() -> None:
    model, video = make(vision_adapters=ted()), clips(3)
    with torch.no_grad():
        assert relative_error(model.encode_image(video)[1:2], model.encode_image(video[1:2])) <= TOLERANCE


@pytest.mark.parametrize("before", HALVES, ids="-".join)
def test_text_adapters(before: tuple[str, ...]) -> None:
    model, ids = make(text_adapters=AdapterPlacement((1, 2), before, 24, "text")), texts()
    with torch.no_grad():
        truth = text_features(model.config, part(model.state_dict(), "text."), ids)
        assert relative_error(model.encode_text(ids), truth) <= TOLERANCE
        packed = model.text.forward_tokens(ids)
        assert relative_error(model.text.features(packed), truth) <= TOLERANCE


@pytest.mark.parametrize("masked", [False, True], ids=["full", "tube"])
def test_gradients_with_adapters(masked: bool) -> None:
    model = make(vision_adapters=ted(), text_adapters=AdapterPlacement(None, ("mlp",), 24, "text"))
    video, ids = clips(), texts()
    mask = tube_masks(2, 1, GRID, 0.5)[:, 0] if masked else None
    (model.encode_image(video, mask).square().sum() + model.encode_text(ids).square().sum()).backward()
    state = {k: v.detach().double().requires_grad_() for k, v in model.state_dict().items()}
    loss = image_features(model.config, part(state, "visual."), video.double(), mask).square().sum()
    (loss + text_features(model.config, part(state, "text."), ids).square().sum()).backward()
    for name, p in model.named_parameters():
        if dead(name):
            assert not state[name].grad.any()
            assert p.grad is None or p.grad.abs().max() <= 1e-5
        elif name != "logit_scale":
            assert relative_error(p.grad, state[name].grad) <= 2e-5, name


def test_frozen_towers_give_gradients_to_adapters_alone() -> None:
    model, video = make(vision_adapters=ted()), clips()
    for name, p in model.named_parameters():
        p.requires_grad_("adapter" in name)
    model.encode_image(video).square().sum().backward()
    for name, p in model.named_parameters():
        if not dead(name):
            assert (p.grad is not None and bool(p.grad.any())) == ("adapter" in name), name


def test_checkpointing_with_adapters_changes_nothing() -> None:
    model, video = make(vision_adapters=ted()), clips()
    model.encode_image(video).sum().backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.set_grad_checkpointing()
    model.encode_image(video).sum().backward()
    for name, grad in before.items():
        assert dead(name) or relative_error(model.get_parameter(name).grad, grad) <= 1e-6, name


def test_new_ted_adapters_change_nothing() -> None:
    config, video = make().config, clips()
    torch.manual_seed(0)
    bare = CLIP(config)
    adapted = CLIP(config, vision_adapters=ted())
    adapted.load_state_dict(bare.state_dict(), strict=False)
    with torch.no_grad():
        assert relative_error(adapted.encode_image(video), bare.encode_image(video)) <= 1e-6


def test_adapters_switched_off_leave_the_tower_they_were_added_to() -> None:
    video, ids = clips(), texts()
    model = make(vision_adapters=ted(), text_adapters=AdapterPlacement(None, ("attn", "mlp"), 24, "text"))
    bare = CLIP(model.config).eval()
    bare.load_state_dict({n: t for n, t in model.state_dict().items() if "adapter" not in n})
    with torch.no_grad():
        adapted = model.encode_image(video), model.encode_text(ids)
        model.visual.transformer.enable_adapters(False)
        assert torch.equal(model.encode_image(video), bare.encode_image(video))
        loose = random_masks(2, 1, GRID, 0.5)
        assert torch.equal(model.encode_image(video, loose), bare.encode_image(video, loose))
        assert torch.equal(model.encode_text(ids), adapted[1])
        model.text.transformer.enable_adapters(False)
        assert torch.equal(model.encode_text(ids), bare.encode_text(ids))
        model.visual.transformer.enable_adapters()
        assert torch.equal(model.encode_image(video), adapted[0])


def test_names_are_those_of_m2clip() -> None:
    text = AdapterPlacement((3,), ("mlp",), 24, "text")
    model = make(vision_adapters=ted(("mlp",), (1,)), text_adapters=text, extra=1)
    names = {n for n in model.state_dict() if "adapter" in n}
    place = "visual.transformer.resblocks.1.adapter_pre_mlp"
    inner = [f"{part}.{kind}" for part in ("fc1", "conv", "fc2") for kind in ("weight", "bias")]
    pairs = [f"{place}.{branch}{name}" for branch in ("", "offset_adapter.") for name in inner]
    block = "text.transformer.resblocks.3.adapter_pre_mlp"
    assert names == {*pairs, *(f"{block}.textad_fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias"))}


@pytest.mark.parametrize("masked", [False, True], ids=["full", "pack"])
def test_compiles_with_adapters(masked: bool) -> None:
    model, video = make(vision_adapters=ted(), vision_depth=2), clips()
    mask = sample_pack(2, 2, GRID, 0.5) if masked else None
    with torch.no_grad():
        compiled = torch.compile(model.visual, fullgraph=True, backend="aot_eager")
        assert relative_error(compiled(video, mask), model.visual(video, mask)) <= TOLERANCE


@pytest.mark.parametrize("kind", ["bool", "pack"])
def test_a_mask_that_is_no_tube_is_refused(kind: str) -> None:
    model, video = make(vision_adapters=ted()), clips()
    mask: Any = random_masks(2, 1, GRID, 0.5)[:, 0]
    if kind == "pack":
        mask = sample_pack(2, 1, GRID, 0.5, per_slot=True)
    with pytest.raises(ValueError, match="the same cells in (every|all 4) frame"):
        model.encode_image(video, mask)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(layers=(3,)), r"layers must lie in 0\.\.2.*got 3"),
        (dict(layers=(-1,)), "got -1"),
        (dict(before=()), 'before must be "attn", "mlp" or both'),
        (dict(before=("norm",)), "got"),
        (dict(hidden=0), "hidden must be at least 1, got 0"),
        (dict(kind="lora"), "kind must be one of ted, text, got 'lora'"),
    ],
)
def test_a_bad_placement_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CLIP(CLIPConfig(**{**make().config.to_dict()}), vision_adapters=AdapterPlacement(**changes))
