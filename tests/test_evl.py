"""EVL against its restatement: outputs, gradients, streaming, the frozen backbone, masks, sizes."""

from typing import Any

import plain_evl
import pytest
import torch
from evl_makers import CLASSES, FRAMES, clips, kept_cells, plain_layers, plain_logits, tiny_config, tiny_model
from numerics import assert_close_to_truth, relative_error
from torch import Tensor
from torch.nn import functional as F

from mmfast import EVL, sample_pack, tube_masks
from mmfast.evl_decoder import QueryAttention

MODULES = ("temporal_conv", "temporal_positions", "temporal_cross_attention")
SWITCHES = [pytest.param({}, id="all")] + [
    pytest.param({name: name == only for name in MODULES}, id=str(only)) for only in (None, *MODULES)
]


def wide(model: EVL) -> dict[str, Tensor]:
    """The state in float64, decoder and head to be differentiated."""
    return {n: t.detach().double().requires_grad_(not n.startswith("backbone.")) for n, t in model.state_dict().items()}


@pytest.mark.parametrize("backbone", ["clip", "vit"])
@pytest.mark.parametrize("changes", SWITCHES)
@torch.no_grad()
def test_logits_are_the_restatements(backbone: str, changes: dict[str, Any]) -> None:
    model = tiny_model(backbone, **changes)
    video = clips(model.config)
    truth = plain_logits(model.config, wide(model), video.double())
    assert relative_error(model(video), truth) < 1e-5


@pytest.mark.parametrize("backbone", ["clip", "vit"])
def test_decoder_gradients_are_the_restatements(backbone: str) -> None:
    model = tiny_model(backbone, mlp_dropout=0.0, class_dropout=0.0).train()
    video, labels = clips(model.config, 3), torch.tensor([0, 4, 2])
    loss = F.cross_entropy(model(video), labels)
    loss.backward()
    state = wide(model)
    truth = F.cross_entropy(plain_logits(model.config, state, video.double()), labels)
    truth.backward()
    assert abs(loss.item() - truth.item()) < 1e-5 * truth.item()
    largest = max(float(t.grad.norm()) for t in state.values() if t.grad is not None)
    for name, parameter in model.named_parameters():
        if name.startswith("backbone."):
            assert parameter.grad is None, name
            continue
        grad = state[name].grad
        assert grad is not None, name
        assert parameter.grad is not None, name
        error = float((parameter.grad.double() - grad).norm())
        assert error < 1e-5 * max(float(grad.norm()), 1e-2 * largest), f"{name}: {error:.2e}"


@torch.no_grad()
def test_attention_of_a_head_width_of_its_own() -> None:
    model = tiny_model(decoder_dim=64, decoder_num_heads=4, decoder_mlp_ratio=1.5)
    video = clips(model.config)
    assert relative_error(model(video), plain_logits(model.config, wide(model), video.double())) < 1e-5


def test_query_attention_has_no_keys_or_values_in_memory() -> None:
    torch.manual_seed(0)
    attention = QueryAttention(16, 16, 2)
    x, z = torch.randn(3, 16), torch.randn(3, 50, 16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.shape) or t, lambda t: t):
        sizes: list[Any] = []
        attention(x, z)
    assert all(s in ((3, 50, 16), (3, 16, 50)) or s.numel() <= 3 * 2 * 50 for s in sizes), sizes


@torch.no_grad()
def test_masked_views_are_the_restatements() -> None:
    model = tiny_model()
    video = clips(model.config)
    masks = tube_masks(2, 3, (FRAMES, 3, 3), keep=4)
    got = model(video, masks)
    for p in range(3):
        kept = kept_cells(masks[:, p], model.config)
        truth = plain_logits(model.config, wide(model), video.double(), kept)
        assert relative_error(got[:, p], truth) < 1e-5


@pytest.mark.parametrize("backbone", ["clip", "vit"])
@torch.no_grad()
def test_a_pack_is_its_masks(backbone: str) -> None:
    model = tiny_model(backbone)
    video, grid = clips(model.config), (model.config.num_frames, *model.config.grid)
    got = model(video, sample_pack(2, 2, grid, keep=4, seed=3))
    masks = tube_masks(2, 2, grid, keep=4, seed=3)
    assert relative_error(got, model(video, masks).flatten(0, 1).double()) < 1e-6


@torch.no_grad()
def test_a_mask_that_keeps_all_is_none() -> None:
    model = tiny_model("vit")
    video = clips(model.config)
    assert relative_error(model(video, torch.zeros(2, 18, dtype=torch.bool)), model(video).double()) < 1e-6


def test_a_batch_of_no_clip_trains() -> None:
    model = tiny_model().train()
    logits = model(clips(model.config)[:0])
    assert logits.shape == (0, CLASSES)
    logits.sum().backward()
    assert all(float(p.grad.abs().sum()) == 0 for p in model.parameters() if p.grad is not None)


@torch.no_grad()
def test_kept_features_are_the_video() -> None:
    model = tiny_model()
    video = clips(model.config)
    kept = list(model.stream(video))
    assert torch.equal(model.decode(kept), model.encode(video))


@torch.no_grad()
def test_features_are_left_as_they_are() -> None:
    """The published decoder added to its input in place."""
    model = tiny_model()
    kept = list(model.stream(clips(model.config)))
    before = [[t.clone() for t in layer[:3]] for layer in kept]
    model.decode(kept)
    assert all(
        torch.equal(a, b) for old, new in zip(before, kept, strict=True) for a, b in zip(old, new[:3], strict=True)
    )


def test_backbone_runs_as_the_decoder_reads() -> None:
    model = tiny_model(num_layers=2)
    order: list[str] = []
    for name, module in [*model.backbone.transformer.resblocks.named_children()]:
        module.register_forward_hook(lambda *_, name=name: order.append(f"block{name}"))
    for name, module in model.decoder.decoder_layers.named_children():
        module.register_forward_hook(lambda *_, name=name: order.append(f"layer{name}"))
    model(clips(model.config))
    assert order == ["block0", "block1", "layer0", "block2", "layer1"]


def test_features_of_a_block_are_free_before_the_next_runs() -> None:
    import weakref

    model = tiny_model(num_layers=3)
    alive: list[int] = []
    seen: list[Any] = []
    model.backbone.transformer.resblocks[2].register_forward_pre_hook(
        lambda *_: alive.append(sum(r() is not None for r in seen))
    )
    layer = model.decoder.layer

    def watched(i: int, x: Tensor, features: Any) -> Tensor:
        seen.append(weakref.ref(features.q))
        return layer(i, x, features)

    model.decoder.layer = watched  # type: ignore[method-assign]  # to see what it is given
    with torch.no_grad():
        model(clips(model.config))
    assert alive == [0]


def test_training_leaves_the_backbone_alone() -> None:
    model = tiny_model().train()
    assert not any(m.training for m in model.backbone.modules())
    assert model.decoder.training
    assert not any(p.requires_grad for p in model.backbone.parameters())
    video = clips(model.config).requires_grad_()
    assert all(not t.requires_grad for layer in model.stream(video) for t in layer[:3])


def test_unfrozen_backbone_trains() -> None:
    """Released code raised here: features were modified in place."""
    model = tiny_model(mlp_dropout=0.0, class_dropout=0.0)
    model.freeze_backbone(False)
    video, labels = clips(model.config), torch.tensor([1, 3])
    F.cross_entropy(model(video), labels).backward()
    state = {n: t.detach().double().requires_grad_() for n, t in model.state_dict().items()}
    F.cross_entropy(plain_logits(model.config, state, video.double()), labels).backward()
    for name in ("conv1.weight", "transformer.resblocks.1.attn.qkv.weight", "transformer.resblocks.2.mlp.fc1.weight"):
        grad, truth = model.backbone.get_parameter(name).grad, state[f"backbone.{name}"].grad
        assert grad is not None
        assert truth is not None
        assert relative_error(grad, truth) < 1e-5, name


@pytest.mark.parametrize("backbone", ["clip", "vit"])
def test_blocks_of_a_trained_backbone_are_computed_again(backbone: str) -> None:
    def step(what: str | None) -> tuple[dict[str, Tensor], int]:
        model, kept = tiny_model(backbone), []
        model.freeze_backbone(False)
        if what is not None:
            model.set_grad_checkpointing(True, what)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
            loss = model(clips(model.config)).square().sum()
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, sum(kept)

    (plain, most), (again, least) = step(None), step("block")
    assert least < 0.7 * most
    assert plain.keys() == again.keys()
    for name, grad in plain.items():
        assert relative_error(again[name], grad) < 1e-6, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_backbone_of_half_precision(dtype: torch.dtype) -> None:
    model = tiny_model()
    video = clips(model.config)
    truth = plain_logits(model.config, wide(model), video.double())
    low = {n: t.to(dtype) for n, t in model.state_dict().items() if n.startswith("backbone.")}
    layers = plain_layers(model.config, low, video.to(dtype))
    layers = [{n: t.float() for n, t in layer.items()} for layer in layers]
    plain = plain_evl.logits(model.config, model.state_dict(), layers)
    model.backbone.to(dtype)
    with torch.autocast("cpu", enabled=False):
        got = model(video)
    assert got.dtype == torch.float32
    assert_close_to_truth("logits", got, plain, truth)


@torch.no_grad()
def test_half_backbone_keeps_its_dtype_under_autocast() -> None:
    model = tiny_model()
    model.backbone.to(torch.float16)
    with torch.autocast("cpu", torch.bfloat16):
        layers = list(model.stream(clips(model.config)))
    assert {t.dtype for layer in layers for t in layer[:3]} == {torch.float16}


def test_training_under_autocast_comes_close() -> None:
    model = tiny_model(mlp_dropout=0.0, class_dropout=0.0)
    video, labels = clips(model.config), torch.tensor([1, 3])
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(video), labels)
    loss.backward()
    truth = F.cross_entropy(plain_logits(model.config, wide(model), video.double()), labels)
    assert abs(loss.item() - truth.item()) < 0.05 * truth.item()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.decoder.parameters())


@torch.no_grad()
def test_raw_pixels_on_any_strides() -> None:
    model = tiny_model()
    raw = torch.randint(0, 256, (2, FRAMES, 24, 24, 3), dtype=torch.uint8)
    video = raw.permute(0, 4, 1, 2, 3)
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in (model.mean, model.std))
    assert relative_error(model(video), model((video / 255 - mean) / std).double()) < 1e-5


@torch.no_grad()
def test_no_temporal_module_sees_no_order_of_frames() -> None:
    model = tiny_model(**dict.fromkeys(MODULES, False))
    video = clips(model.config)
    assert relative_error(model(video.flip(2)), model(video).double()) < 1e-5


def test_gradients_are_the_same_every_time() -> None:
    model = tiny_model().eval()
    video = clips(model.config)
    grads = []
    for _ in range(2):
        model.zero_grad()
        model(video).square().sum().backward()
        grads.append([p.grad.clone() for p in model.decoder.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("masked", [False, True])
def test_compiles_whole(masked: bool) -> None:
    model = tiny_model()
    torch._dynamo.reset()
    video = clips(model.config)
    pack = sample_pack(2, 1, (FRAMES, 3, 3), keep=4) if masked else None
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = compiled(video, pack)
    got.square().sum().backward()
    grads = [p.grad.clone() for p in model.decoder.parameters() if p.grad is not None]
    model.zero_grad()
    eager = model(video, pack)
    eager.square().sum().backward()
    assert relative_error(got.detach(), eager.detach().double()) < 1e-5
    own = [p.grad for p in model.decoder.parameters() if p.grad is not None]
    scale = max(float(g.norm()) for g in own)
    assert all(float((a - b).norm()) < 1e-5 * scale for a, b in zip(grads, own, strict=True))


def test_fresh_temporal_tables_change_nothing() -> None:
    config = tiny_config()
    torch.manual_seed(0)
    model = EVL(config).eval()
    video = clips(config)
    with torch.no_grad():
        layers = [layer._replace(q=layer.q.flip(1)) for layer in model.stream(video) if layer.q is not None]
        assert torch.equal(model.decode(layers), model.encode(video))
