"""CLIP's towers against their equations in plain torch: frames, masks, packed texts, gradients, and clear errors."""

import copy
import pickle

import pytest
import torch
from clip_makers import END, clips, make, texts
from numerics import relative_error
from plain import part
from plain_clip import frame_tokens, image_features, text_features, text_states

from mmfast import CLIP, Pack, pack_masks, random_masks, sample_pack, tube_masks

TOLERANCE = 1e-5
GRID = (4, 3, 3)


def visual(model: CLIP) -> dict[str, torch.Tensor]:
    return part(model.state_dict(), "visual.")


def text(model: CLIP) -> dict[str, torch.Tensor]:
    return part(model.state_dict(), "text.")


def uneven_masks(batch: int = 2, views: int = 1) -> torch.Tensor:
    """A different number of cells in every frame, at least one."""
    mask = torch.rand(batch, views, *GRID, generator=torch.Generator().manual_seed(5)).flatten(3) < 0.5
    mask[..., 4] = False
    return mask.flatten(2)


# -- vision ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masks", [None, tube_masks, random_masks], ids=["full", "tube", "random"])
@pytest.mark.parametrize("gelu", ["quick", "erf"])
def test_frame_features_equal_the_published_model(gelu: str, masks) -> None:
    model, video = make(gelu=gelu), clips()
    mask = None if masks is None else masks(2, 1, GRID, 0.5)[:, 0]
    with torch.no_grad():
        expected = image_features(model.config, visual(model), video, mask)
        assert relative_error(model.encode_image(video, mask), expected) <= TOLERANCE


def test_an_image_is_a_frame_without_its_dimension() -> None:
    model, video = make(), clips()
    with torch.no_grad():
        assert torch.equal(model.encode_image(video[:, :, 1]), model.encode_image(video[:, :, 1:2])[:, 0])


def test_a_masked_image() -> None:
    model, image = make(), clips(2, 1)[:, :, 0]
    masks = random_masks(2, 3, (1, 3, 3), 0.4)
    with torch.no_grad():
        got = model.encode_image(image, masks)
        for view in range(3):
            own = image_features(model.config, visual(model), image[:, :, None], masks[:, view])[:, 0]
            assert relative_error(got[:, view], own) <= TOLERANCE


def test_class_tokens_are_those_before_the_last_norm() -> None:
    model, video = make(), clips()
    with torch.no_grad():
        expected = frame_tokens(model.config, visual(model), video)
        assert relative_error(model.visual.forward_frames(video), expected[:, :, 0]) <= TOLERANCE
        packed = model.visual.forward_tokens(video)
        assert relative_error(packed.tokens, expected.flatten(0, 2)) <= TOLERANCE
        assert packed.pack.keep_idx.tolist() == list(range(10)) * 8


def test_head_and_project_complete_forward_frames() -> None:
    model, video = make(), clips()
    with torch.no_grad():
        first = model.visual.forward_frames(video)
        assert relative_error(model.visual.project(model.visual.head(first)), model.visual(video)) <= TOLERANCE


@pytest.mark.parametrize("shape", ["view", "views"])
def test_frames_that_keep_different_numbers_of_cells(shape: str) -> None:
    model, video = make(), clips()
    masks = uneven_masks(2, 1 if shape == "view" else 3)
    masks = masks[:, 0] if shape == "view" else masks
    with torch.no_grad():
        got = model.encode_image(video, masks)
        for clip in range(2):
            for frame in range(4):
                for view, own in enumerate(masks[clip].reshape(-1, 4, 9)[:, frame]):
                    one = image_features(
                        model.config, visual(model), video[clip : clip + 1, :, frame : frame + 1], own[None]
                    )
                    place = (clip, frame) if shape == "view" else (clip, view, frame)
                    assert relative_error(got[place], one[0, 0]) <= TOLERANCE


def test_tokens_of_uneven_frames_stand_under_their_ids() -> None:
    model, video, mask = make(), clips(), uneven_masks()[:, 0]
    with torch.no_grad():
        packed = model.visual.forward_tokens(video, mask)
    frame = mask.view(8, 9)[5]
    start, end = packed.cu_seqlens[5:7].tolist()
    assert packed.pack.keep_idx[start:end].tolist() == [0, *(1 + (~frame).nonzero().flatten()).tolist()]
    one = frame_tokens(model.config, visual(model), video[1:, :, 1:2], frame[None])[0, 0]
    assert relative_error(packed.tokens[start:end], one) <= TOLERANCE


@pytest.mark.parametrize("kind", ["tube", "uneven", "uneven frames of even views"])
def test_a_pack_gives_what_its_mask_gives(kind: str) -> None:
    model, video = make(), clips()
    masks = tube_masks(2, 2, GRID, 0.5, seed=3) if kind == "tube" else uneven_masks(2, 2)
    if kind.endswith("views"):
        counts = torch.tensor([1, 3, 2, 2])
        masks = (torch.arange(9) >= counts[:, None]).flatten().expand(2, 2, -1)
    pack = sample_pack(2, 2, GRID, 0.5, seed=3) if kind == "tube" else pack_masks(masks)
    with torch.no_grad():
        assert relative_error(model.encode_image(video, pack), model.encode_image(video, masks).flatten(0, 1)) <= 1e-6


def test_uint8_is_normalised_inside() -> None:
    model = make()
    raw = torch.randint(0, 256, (2, 4, 48, 48, 3), dtype=torch.uint8).permute(0, 4, 1, 2, 3)
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (model.mean, model.std))
    with torch.no_grad():
        assert relative_error(model.encode_image(raw), model.encode_image((raw / 255 - mean) / std)) <= TOLERANCE


def test_positions_of_an_oblong_frame_are_resized() -> None:
    model = make()
    table = model.visual.positional_embedding[1:].detach().view(1, 3, 3, -1).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(table, (2, 5), mode="bicubic").flatten(2).transpose(1, 2)[0]
    assert torch.allclose(model.visual._positions_of((1, 2, 5)), expected, atol=1e-6)


def test_an_empty_batch_gives_an_empty_result() -> None:
    model = make()
    with torch.no_grad():
        assert model.encode_image(clips()[:0]).shape == (0, 4, 40)
        assert model.encode_image(clips()[:0], tube_masks(0, 2, GRID)).shape == (0, 2, 4, 40)
        assert model.encode_text(texts()[:0]).shape == (0, 40)


# -- text --------------------------------------------------------------------------------------------------------------


def test_packed_texts_equal_padded_ones() -> None:
    model, ids = make(), texts()
    with torch.no_grad():
        assert relative_error(model.encode_text(ids), text_features(model.config, text(model), ids)) <= TOLERANCE


def test_texts_of_one_length() -> None:
    model, ids = make(), texts((6, 6, 6))
    with torch.no_grad():
        assert model.text.pack(ids).length == 7
        assert relative_error(model.encode_text(ids), text_features(model.config, text(model), ids)) <= TOLERANCE


def test_what_stands_behind_the_end_changes_nothing() -> None:
    model, ids = make(), texts()
    other = ids.clone()
    for row in other:
        row[int(row.argmax()) + 1 :] = END  # as Hugging Face pads
    with torch.no_grad():
        assert torch.equal(model.encode_text(ids), model.encode_text(other))
        assert torch.equal(model.encode_text(ids), model.encode_text(ids.int()))


def test_ids_may_be_cut_behind_the_longest_text() -> None:
    model, ids = make(), texts((3, 4, 5))
    with torch.no_grad():
        assert torch.equal(model.encode_text(ids[:, :6]), model.encode_text(ids))


def test_token_states_stand_in_their_places() -> None:
    model, ids = make(), texts()
    with torch.no_grad():
        packed = model.text.forward_tokens(ids)
        states, expected = model.text.unpack(packed), text_states(model.config, text(model), ids)
        assert relative_error(model.text.features(packed), model.encode_text(ids)) <= TOLERANCE
    for row, states_of, expected_of in zip(ids, states, expected, strict=True):
        end = int(row.argmax()) + 1
        assert relative_error(states_of[:end], expected_of[:end]) <= TOLERANCE
        assert not states_of[end:].any()


def test_a_pack_at_hand_is_used() -> None:
    model, ids = make(), texts()
    pack = model.text.pack(ids)
    with torch.no_grad():
        assert torch.equal(model.encode_text(ids, pack), model.encode_text(ids))


def test_extra_blocks_hold_weights_only() -> None:
    model, ids = make(extra=1), texts()
    assert "text.transformer.resblocks.3.attn.qkv.weight" in model.state_dict()
    with torch.no_grad():
        assert relative_error(model.encode_text(ids), text_features(model.config, text(model), ids)) <= TOLERANCE


# -- both --------------------------------------------------------------------------------------------------------------


def test_logits_are_scaled_cosines() -> None:
    model, ids = make(), texts()
    image = clips(3, 1)[:, :, 0]
    with torch.no_grad():
        per_image, per_text = model(image, ids)
        a, b = model.encode_image(image), model.encode_text(ids)
        expected = model.logit_scale.exp() * torch.cosine_similarity(a[:, None], b[None], dim=-1)
    assert relative_error(per_image, expected) <= TOLERANCE
    assert torch.equal(per_text, per_image.t())


@pytest.mark.parametrize("kind", ["full", "tube", "uneven"])
def test_gradients_equal_the_published_model(kind: str) -> None:
    model, video, ids = make(), clips(), texts()
    mask = {"full": None, "tube": tube_masks(2, 1, GRID, 0.5)[:, 0], "uneven": uneven_masks()[:, 0]}[kind]
    (model.encode_image(video, mask).square().sum() + model.encode_text(ids).square().sum()).backward()
    state = {k: v.detach().double().requires_grad_() for k, v in model.state_dict().items()}
    own = part(state, "visual.")
    if kind == "uneven":
        frames = [
            image_features(model.config, own, video[c : c + 1, :, f : f + 1].double(), mask[c].view(4, 9)[f : f + 1])
            for c in range(2)
            for f in range(4)
        ]
        loss = torch.cat(frames).square().sum()
    else:
        loss = image_features(model.config, own, video.double(), mask).square().sum()
    (loss + text_features(model.config, part(state, "text."), ids).square().sum()).backward()
    for name, p in model.named_parameters():
        if name != "logit_scale":
            assert relative_error(p.grad, state[name].grad) <= 2e-5, name


@pytest.mark.parametrize("what", ["block", "mlp"])
def test_gradient_checkpointing_changes_nothing(what: str) -> None:
    model, video, ids = make(), clips(), texts()
    run = lambda: (model.encode_image(video).sum() + model.encode_text(ids).sum()).backward()
    run()
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.set_grad_checkpointing(what=what)
    run()
    for name, grad in before.items():
        assert relative_error(model.get_parameter(name).grad, grad) <= 1e-6, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_at_most_twice_as_much_as_plain_torch(dtype: torch.dtype) -> None:
    model, video, ids = make(), clips(), texts()
    half = copy.deepcopy(model).to(dtype)
    wide, narrow = ({k: v.to(d) for k, v in model.state_dict().items()} for d in (torch.float64, dtype))
    with torch.no_grad():
        for got, restated, given in (
            (
                half.encode_image(video.to(dtype)),
                lambda s, v: image_features(model.config, part(s, "visual."), v),
                video,
            ),
            (half.encode_text(ids), lambda s, v: text_features(model.config, part(s, "text."), v), ids),
        ):
            exact = given.double() if given.is_floating_point() else given
            rough = given.to(dtype) if given.is_floating_point() else given
            truth, plain = restated(wide, exact), restated(narrow, rough)
            assert relative_error(got, truth) <= 2 * relative_error(plain, truth)


def test_autocast_keeps_the_residual_stream_wide() -> None:
    model, video, ids = make(), clips(), texts()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        first, tokens = model.visual.forward_frames(video), model.text.forward_tokens(ids).tokens
        image = model.encode_image(video)
    assert first.dtype == tokens.dtype == torch.float32
    with torch.no_grad():
        assert relative_error(image, model.encode_image(video)) <= 3e-2


@pytest.mark.parametrize("kind", ["full", "pack", "bool"])
def test_vision_compiles_in_one_graph(kind: str) -> None:
    model, video = make(vision_depth=2), clips()
    mask: torch.Tensor | Pack | None = None if kind == "full" else sample_pack(2, 2, GRID, 0.5)
    if kind == "bool":
        mask = uneven_masks(2, 2)
    with torch.no_grad():
        compiled = torch.compile(model.visual, fullgraph=True, backend="aot_eager")
        assert relative_error(compiled(video, mask), model.visual(video, mask)) <= TOLERANCE


def test_text_compiles_in_one_graph() -> None:
    model, ids = make(text_depth=2), texts()
    with torch.no_grad():
        compiled = torch.compile(model.text, fullgraph=True, backend="aot_eager")
        assert relative_error(compiled(ids), model.text(ids)) <= TOLERANCE


def test_training_compiles_in_one_graph() -> None:
    model, video, ids = make(vision_depth=2, text_depth=2), clips(), texts()
    pack = model.text.pack(ids)
    given = {"visual": (video,), "text": (ids, pack)}
    for name, arguments in given.items():
        tower = getattr(model, name)
        tower(*arguments).square().sum().backward()
        before = {n: p.grad.clone() for n, p in tower.named_parameters()}
        tower.zero_grad()
        torch.compile(tower, fullgraph=True, backend="aot_eager")(*arguments).square().sum().backward()
        for n, grad in before.items():
            assert relative_error(tower.get_parameter(n).grad, grad) <= TOLERANCE, n


@pytest.mark.parametrize("kind", ["full", "pack"])
def test_towers_export(kind: str) -> None:
    model, video, ids = make(vision_depth=2, text_depth=2), clips(), texts()
    mask = None if kind == "full" else sample_pack(2, 2, GRID, 0.5)
    pack = model.text.pack(ids)
    with torch.no_grad():
        seen = torch.export.export(model.visual, (video, mask)).module()(video, mask)
        read = torch.export.export(model.text, (ids, pack)).module()(ids, pack)
        assert relative_error(seen, model.visual(video, mask)) <= TOLERANCE
        assert relative_error(read, model.text(ids)) <= TOLERANCE


def test_pickles_and_copies() -> None:
    model, video = make(), clips()
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickle.dumps(model)).encode_image(video), model.encode_image(video))


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda v: v[0, 0], ValueError, r"video must be \[B, C, F, H, W\], got shape \(4, 48, 48\)"),
        (lambda v: v[:, :2], ValueError, "2 channels"),
        (lambda v: v[:, :, :0], ValueError, "0 frames"),
        (lambda v: v[..., :40], ValueError, "48 x 40; both must be positive multiples of the patch size 16"),
        (lambda v: v.to(torch.int32), TypeError, "int32"),
        (lambda v: v.numpy(), TypeError, "ndarray"),
    ],
)
def test_bad_video_is_named(change, error, message) -> None:
    with pytest.raises(error, match=message):
        make().encode_image(change(clips()))


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.zeros(2, 35, dtype=torch.bool), ValueError, r"mask must be \[2, 36\] .* 4 x 3 x 3"),
        (torch.zeros(2, 36), TypeError, "float32"),
        (torch.arange(36).expand(2, 36) // 9 == 2, ValueError, "every cell of frame 2, view 0"),
    ],
)
def test_bad_mask_is_named(mask, error, message) -> None:
    with pytest.raises(error, match=message):
        make().encode_image(clips(), mask)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (torch.zeros(2, 14, dtype=torch.int64), ValueError, r"token_ids must be \[L, up to 13\], got \(2, 14\)"),
        (torch.zeros(13, dtype=torch.int64), ValueError, r"got \(13,\)"),
        (torch.zeros(2, 13), TypeError, "float32"),
        (torch.full((2, 13), 100), ValueError, r"0\.\.99, got 100\.\.100"),
        (torch.full((2, 13), -1), ValueError, r"got -1\.\.-1"),
        ([[1, 2]], TypeError, "list"),
    ],
)
def test_bad_token_ids_are_named(ids, error, message) -> None:
    with pytest.raises(error, match=message):
        make().encode_text(ids)
