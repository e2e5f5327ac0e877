"""TED-Adapters in MaskedViT: exact against dense blocks, full and tube-masked, and kept by all that a model can do."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapter_makers import GRID, HALVES, SMALL, adapter_parameters, clips, make
from numerics import relative_error
from plain import logits as plain_logits
from plain import tokens as plain_tokens
from ted_makers import published
from torch import Tensor

from mmfast import MaskedViT, Pack, ViTConfig, random_masks, sample_pack, tube_masks
from mmfast.adapters import TEDAdapter

TOLERANCE = 1e-5


def dense_adapters(model: MaskedViT, batch: int, mask: Tensor | None) -> Callable[[int, str, Tensor], Tensor]:
    """The published adapter on the whole grid, removed cells zero after projection and bias."""
    frames, *cells = model.config.grid
    count = cells[0] * cells[1]
    kept = torch.ones(batch, frames * count, dtype=torch.bool) if mask is None else ~mask

    def adapt(block: int, half: str, x: Tensor) -> Tensor:
        adapter = getattr(model.blocks[block], f"adapter_pre_{half}")
        if adapter is None:
            return x
        where = kept.nonzero()[:, 1].view(batch, -1, 1).expand(-1, -1, x.shape[2])
        full = torch.zeros(batch, frames * count, x.shape[2], dtype=x.dtype).scatter(1, where, x)
        rows = torch.nn.functional.pad(full.view(batch * frames, count, -1), (0, 0, 1, 0))
        out = published(adapter, rows, frames, (cells[0], cells[1]), kept.view(batch, frames, count)[:, 0])
        return out[:, 1:].reshape(full.shape).gather(1, where)

    return adapt


def expected(model: MaskedViT, video: Tensor, mask: Tensor | None = None) -> Tensor:
    adapt = dense_adapters(model, len(video), mask)
    return plain_logits(model.config, dict(model.named_parameters()), video, mask, adapt)


# -- what they compute ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True], ids=["full", "tube"])
@pytest.mark.parametrize("layers", [None, (1,), (0, 2)], ids=["all", "middle", "ends"])
@pytest.mark.parametrize("before", HALVES, ids="-".join)
def test_logits_equal_dense_blocks_with_the_published_adapter(
    before: tuple[str, ...], layers: tuple[int, ...] | None, masked: bool
) -> None:
    model, video = make(adapter_before=before, adapter_layers=layers), clips()
    mask = tube_masks(2, 1, GRID, 0.5)[:, 0] if masked else None
    with torch.no_grad():
        assert relative_error(model(video, mask), expected(model, video, mask)) <= TOLERANCE


@pytest.mark.parametrize("masked", [False, True], ids=["full", "tube"])
def test_gradients_equal_those_of_dense_blocks(masked: bool) -> None:
    model, video = make(adapter_before=("attn", "mlp")), clips()
    mask = tube_masks(2, 1, GRID, 0.5)[:, 0] if masked else None
    model(video, mask).square().sum().backward()
    got = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    truth = copy.deepcopy(model).double()
    expected(truth, video.double(), mask).square().sum().backward()
    for name, p in truth.named_parameters():
        assert got[name] is not None
        assert p.grad is not None
        assert relative_error(got[name], p.grad) <= 1e-5, name


def test_tokens_equal_dense_blocks() -> None:
    model, video = make(final_norm=True), clips()
    mask = tube_masks(2, 1, GRID, 0.25)[:, 0]
    adapt = dense_adapters(model, 2, mask)
    with torch.no_grad():
        truth = plain_tokens(model.config, model.state_dict(), video, mask, adapt)
        assert relative_error(model.forward_features(video, mask), truth) <= TOLERANCE
        last, _ = model.forward_intermediates(video, mask, 1)
        assert relative_error(last, truth) <= TOLERANCE


@pytest.mark.parametrize("kind", ["bool", "pack"])
def test_each_view_equals_a_call_of_its_own(kind: str) -> None:
    model, video, masks = make(), clips(), tube_masks(2, 3, GRID, 0.5, seed=7)
    with torch.no_grad():
        given: Any = masks if kind == "bool" else sample_pack(2, 3, GRID, 0.5, seed=7)
        got = model(video, given).view(2, 3, -1)
        for view in range(3):
            assert relative_error(got[:, view], expected(model, video, masks[:, view])) <= TOLERANCE


def test_views_that_keep_unequally_many_tokens() -> None:
    model, video = make(), clips()
    masks = torch.stack([tube_masks(2, 1, GRID, r)[:, 0] for r in (0.25, 0.75)], 1)
    with torch.no_grad():
        got = model(video, masks)
        for view in range(2):
            assert relative_error(got[:, view], expected(model, video, masks[:, view])) <= TOLERANCE


def test_groups_of_clips_in_one_pack() -> None:
    model, video, mask = make(), clips(3), tube_masks(1, 1, GRID, 0.5)[:, 0]
    with torch.no_grad():
        got = model.forward_packed([video[:2], video[2:]], [None, mask])
        alone = [model.forward_packed(video[:2]), model.forward_packed(video[2:], mask)]
    assert relative_error(got.tokens, torch.cat([one.tokens for one in alone])) <= TOLERANCE


def test_another_grid_than_the_configs() -> None:
    model, video = make(), clips(frames=4)
    short = MaskedViT(ViTConfig(**{**SMALL, "num_frames": 4}, adapter_hidden=24))
    short.load_state_dict(model.state_dict())
    short._positions = copy.deepcopy(model._positions)  # the same tokens for both: those of the longer grid, resized
    mask = tube_masks(2, 1, (2, 3, 4), 0.5)[:, 0]
    from mmfast.layers import Constant, resize_positions

    short._positions = Constant(resize_positions(model._positions(), GRID, (2, 3, 4)))
    with torch.no_grad():
        assert relative_error(model(video, mask), short(video, mask)) <= TOLERANCE
        assert relative_error(model(video), short(video)) <= TOLERANCE


def test_the_ensemble_runs_through_the_adapters() -> None:
    model, video = make(), clips(3)
    masks = tube_masks(3, 2, GRID, 0.5, seed=5)
    with torch.no_grad():
        truth = torch.stack([expected(model, video, masks[:, v]).softmax(-1) for v in range(2)]).mean(0)
    for got in (model.ensemble(video, 2, 0.5, seed=5), model.ensemble(video, masks=masks)):
        assert relative_error(got, truth) <= TOLERANCE


@pytest.mark.parametrize("masked", [False, True], ids=["full", "tube"])
def test_no_clips(masked: bool) -> None:
    model = make()
    assert model(clips(0), sample_pack(0, 2, GRID, 0.5) if masked else None).shape == (0, 7)


# -- where they come from -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", HALVES, ids="-".join)
def test_fresh_adapters_change_nothing(before: tuple[str, ...]) -> None:
    model, video = make(adapter_hidden=0), clips()
    mask = tube_masks(2, 1, GRID, 0.5)[:, 0]
    with torch.no_grad():
        plain = model(video, mask)
        model.add_adapters(16, before)
        assert len(adapter_parameters(model)) == 3 * len(before) * 12
        assert relative_error(model(video, mask), plain) <= 1e-6


def test_a_step_on_fresh_adapters_changes_the_output() -> None:
    model, video = make(adapter_hidden=0), clips()
    model.add_adapters(16)
    before = model(video)
    before.square().sum().backward()
    with torch.no_grad():
        for p in adapter_parameters(model).values():
            p -= 0.01 * p.grad if p.grad is not None else 0
        assert relative_error(model(video), before) > 1e-4


def test_adapters_switched_off_leave_the_model_they_were_added_to() -> None:
    model, video = make(), clips()
    bare = MaskedViT(ViTConfig(**SMALL)).eval()
    bare.load_state_dict({n: t for n, t in model.state_dict().items() if ".adapter_pre_" not in n})
    with torch.no_grad():
        model.enable_adapters(False)
        assert torch.equal(model(video, random_masks(2, 1, GRID, 0.5)), bare(video, random_masks(2, 1, GRID, 0.5)))
        model.enable_adapters()
        assert relative_error(model(video), expected(model, video)) <= TOLERANCE


def test_added_adapters_have_the_models_dtype() -> None:
    model = make(adapter_hidden=0).double()
    model.add_adapters(8)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_the_config_says_where_they_are() -> None:
    model = make(adapter_hidden=0)
    model.add_adapters(8, "mlp", [2, 0])
    assert model.config.adapter_before == ("mlp",)
    assert [isinstance(block.adapter_pre_mlp, TEDAdapter) for block in model.blocks] == [True, False, True]
    assert ViTConfig.from_json(model.config.to_json()) == model.config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "hidden must be at least 1, got 0"),
        ((8, "norm"), 'adapter_before must be "attn", "mlp" or both'),
        ((8, ()), "adapter_before must be"),
        ((8, "attn", [3]), r"adapter_layers must be numbers of blocks, 0..2"),
        ((8, "attn", []), "adapter_layers must be"),
    ],
)
def test_bad_places_are_named(arguments: tuple[Any, ...], message: str) -> None:
    model = make(adapter_hidden=0)
    with pytest.raises(ValueError, match=message):
        model.add_adapters(*arguments)
    assert not adapter_parameters(model)


def test_adapters_are_added_once() -> None:
    with pytest.raises(ValueError, match="has adapters already, 24 wide"):
        make().add_adapters(8)


def test_a_width_that_is_no_number_is_named() -> None:
    with pytest.raises(TypeError, match="adapter_hidden must be an int"):
        ViTConfig(adapter_hidden="wide")  # type: ignore[arg-type]  # what a config file may hold


# -- masks they cannot run under ------------------------------------------------------------------------------------


def test_a_mask_that_is_no_tube_is_refused() -> None:
    model, video = make(), clips()
    given: list[Tensor | Pack] = [random_masks(2, 1, GRID, 0.5)[:, 0], sample_pack(2, 1, GRID, 0.5, per_slot=True)]
    for mask in given:
        with pytest.raises(ValueError, match=r"the same cells in all 4"):
            model(video, mask)
    with pytest.raises(ValueError, match="masks must|mask must"):
        model.ensemble(video, masks=random_masks(2, 2, GRID, 0.5))


def test_groups_of_different_grids_are_refused() -> None:
    model = make()
    with pytest.raises(ValueError, match="one token grid"):
        model.forward_packed([clips(1), clips(1, frames=4)])


def test_a_sampled_pack_is_not_looked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known to be tubes is not checked again: on a GPU that would wait for the device at every step."""
    model, video = make(), clips()
    monkeypatch.setattr("mmfast.adapters._check_tubes", None)
    with torch.no_grad():
        model(video, sample_pack(2, 2, GRID, 0.5))
        model(video, tube_masks(2, 2, GRID, 0.5))
        model(video)


# -- what a model can do --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "pack", "bool"])
def test_compiles_in_one_graph(kind: str) -> None:
    model, video = make(depth=2), clips()
    masks: dict[str, Any] = {"full": None, "pack": sample_pack(2, 2, GRID, 0.5), "bool": tube_masks(2, 2, GRID, 0.5)}
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert relative_error(compiled(video, masks[kind]), model(video, masks[kind])) <= TOLERANCE


def test_training_compiles_in_one_graph() -> None:
    model, video, pack = make(depth=2), clips(), sample_pack(2, 2, GRID, 0.5)
    model(video, pack).square().sum().backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(video, pack).square().sum().backward()
    for n, grad in before.items():
        assert relative_error(model.get_parameter(n).grad, grad) <= TOLERANCE, n


@pytest.mark.parametrize("what", ["block", "mlp"])
def test_recomputing_gives_the_same_gradients(what: str) -> None:
    model, video, pack = make(adapter_before=("attn", "mlp")), clips(), sample_pack(2, 2, GRID, 0.5)
    model(video, pack).square().sum().backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.set_grad_checkpointing(True, what)
    model(video, pack).square().sum().backward()
    for n, grad in before.items():
        assert relative_error(model.get_parameter(n).grad, grad) <= TOLERANCE, n


def test_only_adapters_train_where_the_rest_is_frozen() -> None:
    model, video = make(), clips()
    model.requires_grad_(False)
    adapters = adapter_parameters(model)
    for p in adapters.values():
        p.requires_grad_()
    model(video, sample_pack(2, 2, GRID, 0.5)).square().sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(adapters)


def test_a_model_seen_in_inference_mode_still_trains() -> None:
    model = make(adapter_layers=(1,))
    video = clips(5)  # of a number that no other test has: the layout of whole clips is kept
    with torch.inference_mode():
        model(video)
    model(video).sum().backward()
    assert all(p.grad is not None for p in adapter_parameters(model).values())


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["cuda", "cpu"])
def test_a_replayed_graph_sees_the_masks_of_its_own_call(place: str) -> None:
    """A layout made in an earlier run must not become a constant of the graph."""
    model, video = make(adapter_before=("attn", "mlp")), clips(3)
    on_device = copy.deepcopy(model).cuda()
    for seed in range(5):
        got = on_device.ensemble(video.to(place), 2, 0.5, seed=seed)
        assert relative_error(got.cpu(), model.ensemble(video, 2, 0.5, seed=seed)) <= 1e-4
    on_device.enable_adapters(False)
    model.enable_adapters(False)
    got = on_device.ensemble(video.to(place), 2, 0.5, seed=1)
    assert relative_error(got.cpu(), model.ensemble(video, 2, 0.5, seed=1)) <= 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_training_on_a_gpu(dtype: torch.dtype) -> None:
    model, video, pack = make(adapter_before=("attn", "mlp")), clips(), sample_pack(2, 2, GRID, 0.5)
    on_device = copy.deepcopy(model).cuda()
    model(video, pack).square().mean().backward()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        loss = on_device(video.cuda(), pack.to("cuda")).float().square().mean()
    loss.backward()
    for name, p in adapter_parameters(model).items():
        grad = on_device.get_parameter(name).grad
        assert grad is not None
        assert p.grad is not None
        assert relative_error(grad.cpu(), p.grad) <= (1e-3 if dtype == torch.float32 else 0.1), name


@pytest.mark.gpu
def test_a_sampled_pack_makes_nothing_wait_for_the_device() -> None:
    model = make().cuda()
    video = clips().cuda()
    model(video, sample_pack(2, 2, GRID, 0.5, device="cuda"))
    pack = sample_pack(2, 2, GRID, 0.5, seed=1, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(video, pack)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_copied_model_computes_the_same() -> None:
    model, video = make(), clips()
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(video), model(video))
