"""MaskedViT: exact against the published models, the same through every door, and clear about bad input."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import relative_error
from plain import logits as plain_logits
from plain import tokens as plain_tokens

from mmfast import MaskedViT, ViTConfig, pack_masks, random_masks, sample_pack, tube_masks
from mmfast.layers import Block, joint_biases

TOLERANCE = 1e-5
GEOMETRY = {
    "rgb": dict(in_chans=3, patch_size=16, img_size=64),
    "flow": dict(in_chans=2, patch_size=16, img_size=64),
    "pose": dict(in_chans=21, patch_size=4, img_size=16),
    "patch14": dict(in_chans=3, patch_size=14, img_size=56, tubelet_size=1, num_frames=3),
}
SMALL = dict(embed_dim=64, depth=3, num_heads=2, num_frames=8, num_classes=7)


def make(seed: int = 0, **overrides) -> MaskedViT:
    """A small model whose every parameter is random, biases and norms too."""
    torch.manual_seed(seed)
    model = MaskedViT(ViTConfig(**{**SMALL, **GEOMETRY["rgb"], **overrides})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.1 + (1.0 if p.dim() == 1 else 0.0) * 0.3)
    return model


def clips(model: MaskedViT, batch: int = 2, seed: int = 1) -> torch.Tensor:
    c = model.config
    return torch.randn(batch, c.in_chans, c.num_frames, *c.frame_size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("modality", GEOMETRY)
@pytest.mark.parametrize(
    "pooling",
    [dict(), dict(final_norm=True, norm_eps=1e-5), dict(final_norm=True, fc_norm=False, pool="first")],
    ids=["videomae", "mmcdfsl", "first-token"],
)
def test_logits_equal_the_published_model(modality: str, pooling: dict, masked: bool) -> None:
    model = make(**GEOMETRY[modality], **pooling)
    video = clips(model)
    mask = tube_masks(2, 1, model.config.grid, 0.75)[:, 0] if masked else None
    with torch.no_grad():
        got = model(video, mask)
    assert relative_error(got, plain_logits(model.config, model.state_dict(), video, mask)) <= TOLERANCE


def test_who_listens_to_the_last_block_hears_it() -> None:
    model = make()
    video, heard = clips(model), []
    with torch.no_grad():
        quietly = model(video)
        for module in (model.blocks[-1], model.blocks[-1].mlp):
            handle = module.register_forward_hook(lambda module, args, out: heard.append(type(module).__name__))
            listened = model(video)
            handle.remove()
            assert relative_error(listened, quietly) <= 1e-6
    assert heard == ["Block", "Mlp"]


def test_biases_of_all_blocks_made_together_are_each_blocks_own() -> None:
    blocks = make().blocks
    with torch.no_grad():
        for bias, block in zip(joint_biases(blocks), blocks, strict=True):
            assert bias is not None
            assert torch.equal(bias, block.attn.joint_bias())


def test_blocks_that_are_not_plainly_ours_make_their_own_biases() -> None:
    class Sharded(Block):
        """As FSDP does it: the block's class is another one, which gathers the parameters for its forward alone."""

    sharded, offloaded, partitioned = (make().blocks for _ in range(3))
    sharded[1].__class__ = Sharded
    offloaded[1].to("meta")
    for parameter in partitioned.parameters():  # as ZeRO-3 does it: empty until the forward
        parameter.data = torch.empty(0)
    with torch.no_grad():
        for blocks in (sharded, offloaded, partitioned, make(qkv_bias="full").blocks):
            assert list(joint_biases(blocks)) == [None] * len(blocks)
    assert list(joint_biases(make().blocks)) == [None] * 3, "where a gradient is wanted"


def test_a_forward_pass_follows_biases_that_change_in_place() -> None:
    model = make()
    video = clips(model)
    with torch.no_grad():
        before = model(video)
        model.blocks[1].attn.q_bias.data.add_(1.0)
        after = model(video)
    assert not torch.equal(before, after)
    assert relative_error(after, plain_logits(model.config, model.state_dict(), video, None)) <= TOLERANCE


@pytest.mark.parametrize("qkv_bias", ["qv", "full", "none"])
def test_layer_scale_and_each_kind_of_bias(qkv_bias: str) -> None:
    model = make(qkv_bias=qkv_bias, init_values=0.1)
    video = clips(model)
    with torch.no_grad():
        assert relative_error(model(video), plain_logits(model.config, model.state_dict(), video)) <= TOLERANCE


def test_features_equal_the_published_tokens() -> None:
    model = make(final_norm=True)
    video, mask = clips(model), random_masks(2, 1, model.config.grid, 0.5)[:, 0]
    with torch.no_grad():
        got = model.forward_features(video, mask)
    assert relative_error(got, plain_tokens(model.config, model.state_dict(), video, mask)) <= TOLERANCE


def test_uint8_is_normalised_inside() -> None:
    model = make()
    raw = torch.randint(0, 256, clips(model).shape, dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (model.mean, model.std))
    with torch.no_grad():
        assert relative_error(model(raw), model((raw / 255 - mean) / std)) <= TOLERANCE


def test_decoder_layout_goes_in_as_a_view() -> None:
    model = make()
    decoded = torch.randint(0, 256, (2, 8, 64, 64, 3), dtype=torch.uint8)
    video = decoded.permute(0, 4, 1, 2, 3)
    with torch.no_grad():
        assert relative_error(model(video), model(video.contiguous())) <= 1e-6


def test_each_view_of_a_clip_equals_a_call_of_its_own() -> None:
    model = make()
    video, masks = clips(model), tube_masks(2, 3, model.config.grid, 0.75)
    with torch.no_grad():
        together = model(video, masks)
        for view in range(3):
            assert relative_error(together[:, view], model(video, masks[:, view])) <= TOLERANCE


def test_ensemble_is_the_mean_probability_of_its_views() -> None:
    model = make()
    video = clips(model, 3)
    masks = tube_masks(3, 2, model.config.grid, 0.75, seed=5, clip_ids=[9, 4, 7])
    with torch.no_grad():
        expected = torch.stack([model(video, masks[:, v]).softmax(-1) for v in range(2)]).mean(0)
    for got in (
        model.ensemble(video, 2, 0.75, seed=5, clip_ids=[9, 4, 7]),
        model.ensemble(video, masks=masks),
        model.ensemble(video, 2, 0.75, seed=5, clip_ids=torch.tensor([9, 4, 7]), micro_batch=1),
        model.ensemble(video, 2, 0.75, seed=5, clip_ids=[9, 4, 7], micro_batch="l2"),
        model.ensemble(video, 2, keep=4, seed=5, clip_ids=[9, 4, 7]),
    ):
        assert relative_error(got, expected) <= TOLERANCE


def test_a_clip_does_not_feel_its_batch() -> None:
    model = make()
    video = clips(model, 4)
    alone = model.ensemble(video[2:3], 2, 0.75, clip_ids=[2])
    assert relative_error(model.ensemble(video, 2, 0.75)[2:3], alone) <= TOLERANCE


def test_views_of_unequal_length_share_a_pack() -> None:
    model = make()
    video = clips(model)
    masks = torch.stack([tube_masks(2, 1, model.config.grid, r)[:, 0] for r in (0.25, 0.75)], 1)
    with torch.no_grad():
        got = model(video, masks)
        packed = model.forward_packed(video, masks)
        for view in range(2):
            assert relative_error(got[:, view], model(video, masks[:, view])) <= TOLERANCE
            own = model.forward_features(video[:1], masks[:1, view])[0]
            start, end = packed.cu_seqlens[view : view + 2].tolist()
            assert relative_error(packed.tokens[start:end], own) <= TOLERANCE


def test_clips_of_several_sizes_share_a_pack() -> None:
    model = make()
    small, long = torch.randn(2, 3, 8, 32, 48), torch.randn(1, 3, 12, 64, 64)
    mask = tube_masks(1, 1, (6, 4, 4), 0.5)[:, 0]
    with torch.no_grad():
        packed = model.forward_packed([small, long], [None, mask])
        for start, end, own in zip(
            packed.cu_seqlens[:-1].tolist(),
            packed.cu_seqlens[1:].tolist(),
            [*model.forward_features(small), *model.forward_features(long, mask)],
            strict=True,
        ):
            assert relative_error(packed.tokens[start:end], own) <= TOLERANCE


def test_positions_of_another_grid_are_interpolated() -> None:
    model = make()
    table = model._positions_of((4, 8, 4))
    native = model._positions().view(4, 4, 4, -1)
    assert torch.allclose(table.view(4, 8, 4, -1)[:, 0], native[:, 0], atol=1e-6)
    middle = 0.75 * native[:, 0] + 0.25 * native[:, 1]
    assert torch.allclose(table.view(4, 8, 4, -1)[:, 1], middle, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_at_most_twice_as_much_as_plain_torch(dtype: torch.dtype) -> None:
    model = make()
    video, mask = clips(model), tube_masks(2, 1, model.config.grid, 0.5)[:, 0]
    with torch.no_grad():
        truth = plain_logits(model.config, {k: v.double() for k, v in model.state_dict().items()}, video.double(), mask)
        half = {k: v.to(dtype) for k, v in model.state_dict().items()}
        plain = plain_logits(model.config, half, video.to(dtype), mask)
        got = copy.deepcopy(model).to(dtype)(video.to(dtype), mask)
    assert relative_error(got, truth) <= 2 * relative_error(plain, truth)


def test_gradients_equal_the_published_model() -> None:
    model = make(init_values=0.1, final_norm=True)
    video, mask = clips(model), tube_masks(2, 1, model.config.grid, 0.5)[:, 0]
    model(video, mask).square().sum().backward()
    state = {k: v.detach().clone().requires_grad_() for k, v in model.state_dict().items()}
    plain_logits(model.config, state, video, mask).square().sum().backward()
    for name, p in model.named_parameters():
        assert relative_error(p.grad, state[name].grad) <= 1e-4, name


def test_gradient_checkpointing_changes_nothing() -> None:
    model = make()
    video = clips(model)
    model(video).sum().backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing()
    model(video).sum().backward()
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, before[name]), name


def test_stochastic_depth_drops_whole_sequences_in_training_only() -> None:
    model = make(drop_path_rate=0.9)
    video = clips(model, 1).expand(8, -1, -1, -1, -1)
    torch.manual_seed(0)
    with torch.no_grad():
        assert relative_error(model(video)[1:], model(video)[:1].expand(7, -1)) <= TOLERANCE
        assert not torch.allclose(model.train()(video)[1:], model(video)[:1].expand(7, -1))


@pytest.mark.parametrize("mask_kind", ["none", "pack", "bool"])
def test_compiles_in_one_graph(mask_kind: str) -> None:
    model = make(depth=1)
    video = clips(model)
    mask = None if mask_kind == "none" else sample_pack(2, 2, model.config.grid, 0.75)
    if mask_kind == "bool":
        mask = torch.stack([tube_masks(2, 1, model.config.grid, r)[:, 0] for r in (0.25, 0.75)], 1)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert relative_error(compiled(video, mask), model(video, mask)) <= TOLERANCE


@pytest.mark.parametrize("mask_kind", ["none", "pack", "bool"])
def test_exports(mask_kind: str) -> None:
    model = make(depth=1)
    video = clips(model)
    mask = None if mask_kind == "none" else sample_pack(2, 2, model.config.grid, 0.75)
    if mask_kind == "bool":
        mask = tube_masks(2, 2, model.config.grid)
    with torch.no_grad():
        exported = torch.export.export(model, (video, mask)).module()
        assert relative_error(exported(video, mask), model(video, mask)) <= TOLERANCE


def test_an_empty_batch_gives_an_empty_result() -> None:
    model = make()
    video = clips(model)[:0]
    with torch.no_grad():
        assert model(video).shape == (0, 7)
        assert model(video, tube_masks(0, 2, model.config.grid)).shape == (0, 2, 7)
        assert model.forward_features(video).shape == (0, 64, 64)
    assert model.ensemble(video).shape == (0, 7)


def test_forward_head_completes_forward_features() -> None:
    for pooling in (dict(final_norm=True), dict(final_norm=True, fc_norm=False, pool="first")):
        model = make(**pooling)
        video, masks = clips(model), tube_masks(2, 2, model.config.grid)
        with torch.no_grad():
            tokens = model.forward_features(video, masks)
            assert relative_error(model.forward_head(tokens), model(video, masks)) <= TOLERANCE
            assert relative_error(model.forward_head(tokens, pre_logits=True), model.encode(video, masks)) <= TOLERANCE


def test_intermediates_follow_timm() -> None:
    model = make(final_norm=True)
    video = clips(model)
    with torch.no_grad():
        final, taken = model.forward_intermediates(video, indices=2, norm=True)
        assert len(taken) == 2
        assert torch.equal(final, taken[-1])
        assert relative_error(final, model.forward_features(video)) <= TOLERANCE
        first = model.forward_intermediates(video, indices=[0], intermediates_only=True)[0]
        model.blocks = model.blocks[:1]
        model.norm = None
        assert relative_error(first, model.forward_features(video)) <= TOLERANCE


def test_classifier_can_be_replaced() -> None:
    model = make()
    model.reset_classifier(3)
    assert model.get_classifier().out_features == model.num_classes == 3
    with torch.no_grad():
        assert model(clips(model)).shape == (2, 3)
    model.reset_classifier(0)
    with torch.no_grad():
        assert torch.equal(model(clips(model)), model.encode(clips(model)))
    with pytest.raises(ValueError, match="num_classes=0"):
        model.ensemble(clips(model))


def test_constants_keep_their_precision_in_half() -> None:
    model = make()
    before = model._positions().clone()
    assert torch.equal(model.to(torch.bfloat16)._positions(), before)


def test_pickles_and_copies() -> None:
    model = make()
    video = clips(model)
    model.ensemble(video)
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickle.dumps(model))(video), model(video))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda v: v[0], ValueError, r"video must be \[B, C, F, H, W\], got shape \(3, 8, 64, 64\)"),
        (lambda v: v[:, :2], ValueError, "2 channels"),
        (lambda v: v[:, :, :7], ValueError, "7 frames"),
        (lambda v: v[..., :60], ValueError, "64 x 60"),
        (lambda v: v[..., :0], ValueError, "64 x 0"),
        (lambda v: v.to(torch.int32), TypeError, "int32"),
        (lambda v: v.numpy(), TypeError, "ndarray"),
    ],
)
def test_bad_video_is_named(change, error, message) -> None:
    model = make()
    with pytest.raises(error, match=message):
        model(change(clips(model)))


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.zeros(2, 63, dtype=torch.bool), ValueError, r"mask must be \[2, 64\]"),
        (torch.zeros(3, 64, dtype=torch.bool), ValueError, r"got \(3, 64\)"),
        (torch.zeros(64, dtype=torch.bool), ValueError, r"got \(64,\)"),
        (torch.zeros(2, 64), TypeError, "float32"),
        ([[True]], TypeError, "list"),
        (torch.ones(2, 64, dtype=torch.bool), ValueError, "removes every token of clip 0, view 0"),
    ],
)
def test_bad_mask_is_named(mask, error, message) -> None:
    model = make()
    with pytest.raises(error, match=message):
        model(clips(model), mask)


def test_unequal_views_cannot_be_stacked() -> None:
    model = make()
    masks = torch.stack([tube_masks(2, 1, model.config.grid, r)[:, 0] for r in (0.25, 0.75)], 1)
    with pytest.raises(ValueError, match="forward_packed"):
        model.forward_features(clips(model), masks)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan")])
def test_bad_ratio_is_named(ratio: float) -> None:
    model = make()
    with pytest.raises(ValueError, match="mask_ratio"):
        model.ensemble(clips(model), 2, ratio)


def test_pack_of_given_masks_keeps_ascending_ids() -> None:
    masks = random_masks(2, 2, (2, 3, 3), 0.5)
    pack = pack_masks(masks)
    assert pack.length == 10
    for s in range(4):
        ids = pack.keep_idx[10 * s : 10 * s + 10].long()
        assert bool((ids.diff() > 0).all())
        assert not masks.view(4, -1)[s][ids].any()


@given(
    st.integers(1, 3),
    st.sampled_from([1, 2, 3, 21]),
    st.sampled_from([1, 2]),
    st.sampled_from([4, 7, 16]),
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
    st.floats(0, 0.99),
    st.permutations([1, 2, 3, 4]),
    st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_any_geometry_stride_and_ratio(batch, channels, tubelet, patch, grid, ratio, order, raw) -> None:
    """Any memory layout of a video of any geometry gives the published model's logits."""
    t, h, w = grid
    model = make(
        in_chans=channels,
        tubelet_size=tubelet,
        patch_size=patch,
        num_frames=t * tubelet,
        img_size=(h * patch, w * patch),
    )
    shape = (batch, channels, t * tubelet, h * patch, w * patch)
    stored = torch.rand([shape[0], *(shape[i] for i in order)]).mul(255).to(torch.uint8 if raw else torch.float32)
    video = stored.permute(0, *(1 + order.index(i) for i in (1, 2, 3, 4)))
    assert video.shape == shape
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (model.config.mean, model.config.std))
    normalised = (video / 255 - mean) / std if raw else video
    mask = tube_masks(batch, 1, grid, ratio)[:, 0]
    with torch.no_grad():
        expected = plain_logits(model.config, model.state_dict(), normalised, mask)
        assert relative_error(model(video, mask), expected) <= TOLERANCE
