"""Blocks fused for inference: the same function, undone without a trace, and clear about what it is not for."""

import copy
import pickle

import clip_makers
import pytest
import torch
from numerics import assert_close_to_truth, relative_error
from plain import logits as plain_logits
from test_vit import clips, make

from mmfast import MaskedViT, random_masks, tube_masks
from mmfast.clip_blocks import AdapterPlacement
from mmfast.fused import FusedBlocks
from mmfast.graphs import _graphs
from mmfast_kernels.mlp import linear_gelu, linear_gelu_ref

TOLERANCE = 1e-5
gpu = pytest.mark.gpu
interpret = pytest.mark.interpret
both = pytest.mark.parametrize("lane", ["plain", pytest.param("kernels", marks=interpret)])
KINDS = {
    "videomae": {},
    "mmcdfsl": dict(final_norm=True, norm_eps=1e-5),
    "first-token": dict(final_norm=True, fc_norm=False, pool="first"),
    "no-norm": dict(final_norm=False, fc_norm=False),
    "layerscale": dict(init_values=0.1),
    "full-bias": dict(qkv_bias="full"),
    "no-bias": dict(qkv_bias="none"),
}


@pytest.mark.parametrize(
    ("lane", "kind"),
    [
        *[("plain", k) for k in KINDS],
        *[pytest.param("kernels", k, marks=interpret) for k in ("first-token", "layerscale")],
    ],
)
@torch.no_grad()
def test_logits_equal_the_published_model(lane: str, kind: str, poisoned_empty: None) -> None:
    model = make(depth=2, **KINDS[kind])
    video, mask = clips(model), tube_masks(2, 1, model.config.grid, 0.75)[:, 0]
    got = model.fuse_for_inference()(video, mask)
    assert relative_error(got, plain_logits(model.config, model.state_dict(), video, mask)) <= TOLERANCE


@pytest.mark.parametrize(
    ("lane", "before"),
    [("plain", "attn"), ("plain", "mlp"), pytest.param("kernels", ("attn", "mlp"), marks=interpret)],
    ids=str,
)
@torch.no_grad()
def test_adapters_read_the_stream_with_its_biases(lane: str, before, poisoned_empty: None) -> None:
    model = make(adapter_hidden=16, adapter_before=before, adapter_layers=(1, 2))
    video, masks = clips(model), tube_masks(2, 2, model.config.grid, 0.75)
    expected = model(video, masks)
    model.enable_adapters(False)
    without = model(video, masks)
    model.fuse_for_inference()
    assert relative_error(model(video, masks), without) <= TOLERANCE
    model.enable_adapters()
    assert relative_error(model(video, masks), expected) <= TOLERANCE


@both
@torch.no_grad()
def test_views_of_different_lengths(lane: str, poisoned_empty: None) -> None:
    model = make()
    masks = torch.stack([random_masks(2, 1, model.config.grid, r)[:, 0] for r in (0.25, 0.75)], 1)
    expected = model(clips(model), masks)
    assert relative_error(model.fuse_for_inference()(clips(model), masks), expected) <= TOLERANCE


@both
@torch.no_grad()
def test_ensemble_and_features(lane: str, poisoned_empty: None) -> None:
    model = make(final_norm=True)
    raw = torch.randint(0, 256, clips(model, 3).shape, dtype=torch.uint8)
    probs, features = model.ensemble(raw, 2, 0.75, seed=3), model.forward_features(raw)
    model.fuse_for_inference()
    assert relative_error(model.ensemble(raw, 2, 0.75, seed=3), probs) <= TOLERANCE
    assert relative_error(model.forward_features(raw), features) <= TOLERANCE


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.bfloat16),
        pytest.param("cpu", torch.float16, marks=interpret),
        pytest.param("cuda", torch.float32, marks=gpu),
        pytest.param("cuda", torch.float16, marks=gpu),
        pytest.param("cuda", torch.bfloat16, marks=gpu),
    ],
)
@pytest.mark.parametrize("cast_first", [False, True], ids=["fused-then-cast", "cast-then-fused"])
@torch.no_grad()
def test_errs_at_most_twice_as_much_as_plain_torch(
    cast_first: bool, device: str, dtype: torch.dtype, poisoned_empty: None
) -> None:
    model = make(embed_dim=128, init_values=0.5)
    video, state = clips(model), model.state_dict()
    truth = plain_logits(model.config, {k: v.double() for k, v in state.items()}, video.double())
    plain = plain_logits(model.config, {k: v.to(device, dtype) for k, v in state.items()}, video.to(device, dtype))
    if cast_first:
        model = model.to(device, dtype).fuse_for_inference()
    else:
        model = model.fuse_for_inference().to(device, dtype)
    error = relative_error(model(video.to(device, dtype)).cpu(), truth)
    assert error <= 2 * relative_error(plain.cpu(), truth) + TOLERANCE


@torch.no_grad()
def test_under_autocast() -> None:
    model = make()
    video = clips(model)
    truth = plain_logits(model.config, {k: v.double() for k, v in model.state_dict().items()}, video.double())
    with torch.autocast("cpu", torch.bfloat16):
        unfused = model(video)
        model.fuse_for_inference()
        got = [model(video), model(video)]
    assert torch.equal(got[0], got[1])
    assert relative_error(got[0], truth) <= 2 * relative_error(unfused, truth)


@torch.no_grad()
def test_the_embedded_tokens_stay_as_they_are() -> None:
    model = make().fuse_for_inference()
    pack, _ = model.pack(clips(model), None)
    x = model.embed(clips(model), pack)
    before = x.clone()
    model.logits(x, pack)
    assert torch.equal(x, before)


@torch.no_grad()
def test_unfused_it_is_the_model_it_was() -> None:
    model = make()
    video, names = clips(model), [name for name, _ in model.named_buffers()]
    before = model(video)
    assert torch.equal(model.fuse_for_inference().unfuse()(video), before)
    assert [name for name, _ in model.named_buffers()] == names


def test_state_dict_is_the_unfused_one(tmp_path) -> None:
    model = make(init_values=0.1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.fuse_for_inference().save_pretrained(tmp_path)
    saved = MaskedViT.from_pretrained(tmp_path).state_dict()
    assert saved.keys() == model.state_dict().keys() == before.keys()
    assert all(torch.equal(saved[k], before[k]) for k in before)


@torch.no_grad()
def test_fused_again_it_follows_new_weights() -> None:
    model, other = make(), make(seed=3)
    model.fuse_for_inference().unfuse().load_state_dict(other.state_dict())
    video = clips(model)
    assert relative_error(model.fuse_for_inference()(video), other(video)) <= TOLERANCE


@torch.no_grad()
def test_weights_are_packed_once() -> None:
    model = make().fuse_for_inference()
    layer = model.fused.blocks[0].fc1
    x = torch.randn(3, 64)
    (first, _), (second, _) = layer.operands(x), layer.operands(x)
    assert first is second
    assert first.is_mkldnn == torch.backends.mkldnn.is_available()


@torch.no_grad()
def test_a_moved_model_packs_and_captures_anew() -> None:
    model = make().fuse_for_inference()
    layer, x = model.fused.blocks[0].fc1, torch.randn(3, 64)
    (first, _), generation = layer.operands(x), model.fused.generation
    model.double().float()
    assert layer.operands(x)[0] is not first
    assert model.fused.generation > generation
    assert model.unfuse().fuse_for_inference().fused.generation > generation + 1


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_fused_models_of_their_own(copied) -> None:
    model = make().fuse_for_inference()
    video = clips(model)
    expected = model(video)
    other = copied(model)
    model.unfuse().head.weight.zero_()
    assert other.fused is not None
    assert torch.equal(other(video), expected)
    assert next(other.blocks.parameters()) is next(other.fused._blocks[0].parameters())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@torch.no_grad()
def test_compiles_in_one_graph(backend: str) -> None:
    torch.compiler.reset()  # what other tests compiled counts against the limit of recompilations
    model = make().fuse_for_inference()
    video, masks = clips(model), tube_masks(2, 2, model.config.grid, 0.75)
    got = torch.compile(model, fullgraph=True, backend=backend)(video, masks)
    assert relative_error(got, model(video, masks)) <= TOLERANCE
    torch.compiler.reset()


def test_training_is_refused() -> None:
    model = make().train()
    with pytest.raises(ValueError, match="call eval"):
        model.fuse_for_inference()
    model.eval().fuse_for_inference().eval()
    with pytest.raises(ValueError, match="train: the model is fused"):
        model.train()
    with pytest.raises(ValueError, match="train: the model is fused"):
        torch.nn.Sequential(model).train()
    with pytest.raises(ValueError, match="has no gradients"):
        model(clips(model))
    assert not model.training
    assert model.unfuse().train().training


def test_a_frozen_model_runs_with_gradients_on() -> None:
    model = make().requires_grad_(False)
    video = clips(model)
    expected = model(video)
    assert relative_error(model.fuse_for_inference()(video), expected) <= TOLERANCE
    with pytest.raises(ValueError, match="has no gradients"):
        model(video.requires_grad_())


def test_what_would_change_the_weights_is_refused() -> None:
    model = make()
    state = model.state_dict()
    model.fuse_for_inference()
    with pytest.raises(ValueError, match="load_state_dict: the model is fused"):
        model.load_state_dict(state)
    with pytest.raises(ValueError, match="load_state_dict: the model is fused"):
        torch.nn.ModuleDict({"model": model}).load_state_dict({f"model.{k}": v for k, v in state.items()})
    with pytest.raises(ValueError, match="add_adapters: the model is fused"):
        model.add_adapters(8)


def test_gelu_is_a_choice_between_two_forms_of_one() -> None:
    blocks = make().fuse_for_inference("tanh").fused
    assert {b.gelu for b in blocks.blocks} == {"tanh"}
    with pytest.raises(ValueError, match="gelu takes"):
        make(gelu="quick").fuse_for_inference("tanh")
    with pytest.raises(ValueError, match="gelu takes"):
        make().fuse_for_inference("quick")


@interpret
@torch.no_grad()
def test_gelu_tanh_runs_in_the_kernel(poisoned_empty: None) -> None:
    model = make().fuse_for_inference("tanh")
    layer = model.fused.blocks[0]
    h = torch.randn(5, 64) * 4
    truth = linear_gelu_ref(h.double(), layer.fc1.weight.double(), layer.fc1.bias.double(), "tanh")
    exact = linear_gelu_ref(h.double(), layer.fc1.weight.double(), layer.fc1.bias.double(), "erf")
    got = linear_gelu(h, *layer.fc1.operands(h), layer.gelu)
    assert_close_to_truth("gelu", got, truth.float(), truth)
    assert float((truth - exact).abs().max()) <= 2.6e-5


@both
@pytest.mark.parametrize(
    "adapters", [None, AdapterPlacement(hidden=16, before=("attn", "mlp"))], ids=["bare", "adapters"]
)
@torch.no_grad()
def test_clip_vision(adapters: AdapterPlacement | None, lane: str, poisoned_empty: None) -> None:
    vision = clip_makers.make(vision_adapters=adapters).visual
    video, masks = clip_makers.clips(), tube_masks(2, 2, (4, 3, 3), 0.5)
    features, tokens = vision(video, masks), vision.forward_tokens(video).tokens
    vision.fuse_for_inference()
    assert relative_error(vision(video, masks), features) <= TOLERANCE
    assert relative_error(vision.forward_tokens(video).tokens, tokens) <= TOLERANCE
    with pytest.raises(ValueError, match="fused"):
        vision.train()
    assert torch.equal(vision.unfuse()(video, masks), features)


@both
@torch.no_grad()
def test_a_causal_tower(lane: str, poisoned_empty: None) -> None:
    text = clip_makers.make().text
    ids = clip_makers.texts()
    expected = text(ids)
    text.transformer.fuse_for_inference()
    assert relative_error(text(ids), expected) <= TOLERANCE


@both
@torch.no_grad()
def test_a_tower_of_one_block_has_nothing_to_fuse(lane: str) -> None:
    vision = clip_makers.make(vision_depth=1).visual
    expected = vision(clip_makers.clips())
    assert torch.equal(vision.fuse_for_inference()(clip_makers.clips()), expected)
    assert len(vision.transformer.fused.blocks) == 0


@gpu
@torch.no_grad()
def test_graphs_follow_fusing_and_unfusing() -> None:
    model = make(embed_dim=128, num_heads=2).cuda()
    video = clips(model, 3).cuda()
    expected = model.ensemble(video, 2, 0.75)
    for change in (model.fuse_for_inference, model.unfuse, model.fuse_for_inference):
        change()
        for _ in range(3):  # eager, captured, replayed
            assert relative_error(model.ensemble(video, 2, 0.75), expected) <= TOLERANCE
    assert sum(c is not None for c in _graphs[model].values()) >= 2


@gpu
@torch.no_grad()
def test_gpu_ensemble_from_host_pixels_in_bf16() -> None:
    model = make(embed_dim=128, num_heads=2)
    raw = torch.randint(0, 256, clips(model, 5).shape, dtype=torch.uint8)
    truth = copy.deepcopy(model).double().ensemble(raw, 3, 0.75)
    model = model.to("cuda", torch.bfloat16)
    allowed = 2 * relative_error(model.ensemble(raw, 3, 0.75).cpu(), truth) + TOLERANCE
    model.fuse_for_inference()
    assert relative_error(model.ensemble(raw, 3, 0.75).cpu(), truth) <= allowed


@gpu
@torch.no_grad()
def test_gpu_residual_goes_through_the_products() -> None:
    """A fused block launches no addition of its own: seven kernels and no elementwise one."""
    model = make(embed_dim=128, num_heads=2, depth=4).to("cuda", torch.bfloat16).fuse_for_inference()
    blocks = model.fused
    assert isinstance(blocks, FusedBlocks)
    pack, _ = model.pack(clips(model).cuda(), None)
    x = model.embed(clips(model).to("cuda", torch.bfloat16), pack)
    blocks(x, pack)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        blocks(x, pack)
    added = [e.count for e in profile.key_averages() if e.key in ("aten::add", "aten::add_")]
    assert sum(added) == 1, "the carry, once, behind the last block"
