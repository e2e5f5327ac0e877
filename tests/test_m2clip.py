"""M2CLIP against its restatement in plain torch: features, the four losses and every gradient; adapters, cache, groups."""

from typing import Any

import m2clip_plain as plain
import numerics
import pytest
import torch
from m2clip_makers import CLASSES, FRAMES, batch, published, texts, tiny_config, tiny_model
from numerics import assert_close_to_truth
from torch import Tensor
from torch.nn import functional as F

from mmfast.m2clip import M2CLIP, unique_rows
from mmfast.m2clip_config import PRESETS, M2CLIPConfig
from mmfast.masks import tube_masks

LOSSES = ("contrastive", "cmc", "cmlm", "vc", "total")


def relative_error(got: Tensor, truth: Tensor) -> float:
    return numerics.relative_error(got.detach(), truth.detach())


def wide(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() for name, t in state.items()}


def expected_losses(model: M2CLIP, given: dict[str, Tensor], state: dict[str, Tensor] | None = None) -> Any:
    ids = (given["token_ids"], given["labels"], given["class_token_ids"], given.get("mlm_labels"))
    return plain.losses(model.config, state or wide(published(model)), given["video"].double(), *ids)


# -- exactness --


@pytest.mark.parametrize("preset", PRESETS)
def test_video_features_frames_and_logits(preset: str) -> None:
    model, video = tiny_model(preset), batch(3)["video"]
    for got, truth in zip(
        model.encode_video(video), plain.encode_video(model.config, wide(published(model)), video.double()), strict=True
    ):
        assert relative_error(got, truth) < 1e-5


@pytest.mark.parametrize("preset", PRESETS)
def test_text_features_and_the_states_up_to_the_end(preset: str) -> None:
    model, ids = tiny_model(preset), texts([4, 0, 10, 1])
    features, states = model.encode_text(ids)
    truth, all_states = plain.encode_text(model.config, wide(published(model)), ids)
    assert relative_error(features, truth) < 1e-5
    live = (torch.arange(ids.shape[1]) <= ids.argmax(-1, keepdim=True))[..., None]
    assert relative_error(states, all_states * live) < 1e-5


@pytest.mark.parametrize("preset", PRESETS)
def test_losses(preset: str) -> None:
    model, given = tiny_model(preset), batch()
    got, truth = model.losses(**given), expected_losses(model, given)
    assert list(got) == ["contrastive", "cmc", "cmlm", "vc", "total"]
    for name in LOSSES:
        assert relative_error(got[name], truth[name]) < 1e-5, name


@pytest.mark.parametrize("preset", ["k400", "ssv2"])
def test_gradients_of_everything_that_trains(preset: str) -> None:
    model, given = tiny_model(preset), batch()
    model.losses(**given)["total"].backward()
    plain_state, state = published(model), wide(published(model))
    for own, video in ((plain_state, given["video"]), (state, given["video"].double())):
        for name, t in own.items():
            t.requires_grad_("adapter" in name)
        ids = (given["token_ids"], given["labels"], given["class_token_ids"], given["mlm_labels"])
        plain.losses(model.config, own, video, *ids)["total"].backward()
    names = dict(zip(model.state_dict(), plain_state, strict=True))
    checked = 0
    for name, parameter in model.named_parameters():
        by_torch, truth = plain_state[names[name]].grad, state[names[name]].grad
        if "adapter" not in name:
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None, name
        assert by_torch is not None, name
        assert truth is not None, name
        assert_close_to_truth(name, parameter.grad, by_torch, truth)
        assert relative_error(parameter.grad, truth) < 1e-4 or float(truth.norm()) < 1e-6, name
        checked += 1
    assert checked > 20


def test_reference_softmaxes_twice() -> None:
    assert tiny_config("reference").cmc_double_softmax
    model, given = tiny_model("reference"), batch()
    k = torch.tensor(float(CLASSES))
    assert float(model.losses(**given)["cmc"].detach()) >= float(torch.log(1 + (k - 1) / torch.e)) - 1e-6


def test_masked_views_equal_the_model_on_what_is_kept() -> None:
    model, video = tiny_model("ssv2"), batch(2)["video"]
    masks = tube_masks(2, 3, (FRAMES, 4, 4), 0.5, seed=3)
    together = model.encode_video(video, masks)
    assert together.features.shape == (2, 3, 32)
    for view in range(3):
        alone = model.encode_video(video, masks[:, view])
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[:, view], b, rtol=1e-5, atol=1e-5)
    kept_all = model.encode_video(video, torch.zeros(2, FRAMES * 16, dtype=torch.bool))
    torch.testing.assert_close(kept_all.class_logits, model(video), rtol=1e-5, atol=1e-5)


def test_uint8_video_is_normalised_inside() -> None:
    model = tiny_model()
    raw = torch.randint(0, 256, (2, FRAMES, 32, 32, 3), dtype=torch.uint8).permute(0, 4, 1, 2, 3)
    mean, std = (torch.tensor(x).view(3, 1, 1, 1) for x in (model.mean, model.std))
    torch.testing.assert_close(model(raw), model((raw / 255 - mean) / std), rtol=1e-4, atol=1e-4)


def test_a_fresh_model_is_the_clip_it_is_made_of() -> None:
    torch.manual_seed(0)
    model = M2CLIP(tiny_config("k400", text_layers=0)).eval()
    given = batch(2)
    frames = model.clip.encode_image(given["video"])
    torch.testing.assert_close(model.encode_video(given["video"]).features, frames.mean(1), rtol=1e-5, atol=1e-5)


# -- masked words --


@pytest.mark.parametrize("given_labels", [None, "all ignored"])
def test_nothing_masked_is_a_loss_of_zero_and_no_nan(given_labels: str | None) -> None:
    model, given = tiny_model(), batch()
    given["mlm_labels"] = None if given_labels is None else torch.full_like(given["token_ids"], -100)
    losses = model.losses(**given)
    assert float(losses["cmlm"].detach()) == 0.0
    losses["total"].backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert bool(parameter.grad.isfinite().all()), name
            assert not name.startswith("mlm_adapter") or not bool(parameter.grad.any()), name


def test_words_are_read_from_the_frames_of_their_own_clip() -> None:
    model, given = tiny_model(), batch()
    before = model.losses(**given)["cmlm"].detach()
    clips_with_words = {0, 3}
    for clip in range(4):
        changed = given["video"].clone()
        changed[clip] += 1
        after = model.losses(**{**given, "video": changed})["cmlm"].detach()
        assert bool(before != after) is (clip in clips_with_words)


def test_the_head_for_words_can_be_left_out() -> None:
    model, given = tiny_model(num_words=0), batch()
    assert not any("mlm" in name for name, _ in model.named_parameters())
    assert len(model.clip.text.transformer.resblocks) == model.config.clip.text_depth
    with pytest.raises(ValueError, match="without the head for masked words"):
        model.losses(**given)
    assert float(model.losses(**{**given, "mlm_labels": None})["cmlm"].detach()) == 0.0


# -- one pass over texts --


def test_every_different_text_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = tiny_model(), batch()
    seen: list[int] = []
    forward = type(model.clip.text).forward_tokens
    monkeypatch.setattr(
        type(model.clip.text), "forward_tokens", lambda self, ids, *a: seen.append(len(ids)) or forward(self, ids, *a)
    )
    model.losses(**given)
    assert seen == [CLASSES + 2]  # two captions have words masked, two are those of their classes
    model.losses(**{**given, "token_ids": given["class_token_ids"][given["labels"]], "mlm_labels": None})
    assert seen[1:] == [CLASSES]


def test_unique_rows_keep_their_order() -> None:
    rows, row_of = unique_rows(torch.tensor([[3, 1], [0, 2], [3, 1], [1, 1], [0, 2]]))
    assert rows.tolist() == [[3, 1], [0, 2], [1, 1]]
    assert row_of.tolist() == [0, 1, 0, 2, 1]


# -- classification by text --


def test_zero_shot_is_the_softmax_of_cosines_over_any_classes() -> None:
    model, video = tiny_model(), batch(3)["video"]
    ids = texts([3, 7], seed=5)
    state = wide(published(model))
    v, t = plain.encode_video(model.config, state, video.double())[0], plain.encode_text(model.config, state, ids)[0]
    truth = (100 * F.normalize(v, dim=-1) @ F.normalize(t, dim=-1).t()).softmax(-1)
    with torch.no_grad():
        assert relative_error(model.zero_shot(video, ids), truth) < 1e-4  # cosines are multiplied by 100


def test_several_prompts_a_class_are_averaged_as_unit_features() -> None:
    model = tiny_model()
    ids = torch.stack([texts([3, 7], seed=5), texts([2, 9], seed=6)])
    with torch.no_grad():
        each = F.normalize(model.clip.encode_text(ids.flatten(0, 1)), dim=-1).unflatten(0, (2, 2))
        torch.testing.assert_close(model.label_features(ids), F.normalize(each.mean(0), dim=-1))


def test_label_features_are_kept_in_evaluation_until_something_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model(), texts([3, 7])
    calls: list[int] = []
    forward = type(model.clip.text).forward
    monkeypatch.setattr(type(model.clip.text), "forward", lambda self, i: calls.append(1) or forward(self, i))
    with torch.no_grad():
        first = model.label_features(ids)
        assert torch.equal(model.label_features(ids.clone()), first)
        assert len(calls) == 1
        model.label_features(texts([3, 7], seed=9))
        assert len(calls) == 2
        model.label_features(ids)
        next(p for p in model.clip.text.parameters() if p.requires_grad).add_(1)
        assert not torch.equal(model.label_features(ids), first)
        assert len(calls) == 4
        model.train()
        model.label_features(ids)
        model.label_features(ids)
        assert len(calls) == 6
    model.eval()
    assert model.label_features(ids).requires_grad  # with gradients nothing is kept
    assert len(calls) == 7


def test_adapters_of_each_tower_are_switched_apart() -> None:
    model, video, ids = tiny_model("ssv2"), batch(2)["video"], texts([3, 7])
    bare = {name: t for name, t in published(model).items() if "adapter" not in name or "adapter_fc" in name}
    wanted_video = plain.encode_video(model.config, wide(bare), video.double())[0]
    wanted_text = plain.encode_text(model.config, wide(bare), ids)[0]
    with torch.no_grad():
        on = model.encode_video(video).features, model.label_features(ids)
        model.enable_adapters(text=False)
        assert torch.equal(model.encode_video(video).features, on[0])
        assert relative_error(model.label_features(ids), F.normalize(wanted_text, dim=-1)) < 1e-5
        model.enable_adapters(vision=False, text=True)
        assert relative_error(model.encode_video(video).features, wanted_video) < 1e-5
        assert torch.equal(model.label_features(ids), on[1])
        model.enable_adapters(vision=True)
        assert torch.equal(model.encode_video(video).features, on[0])


# -- what trains --


@pytest.mark.parametrize(
    ("preset", "millions"), [("k400", 16_138_136), ("ssv2", 39_524_248), ("reference", 16_138_136)]
)
def test_trainable_parameters_are_as_many_as_published(preset: str, millions: int) -> None:
    with torch.device("meta"):
        model = M2CLIP(M2CLIPConfig.preset(preset, "ViT-B/16"))
    assert model.num_trainable() == millions
    assert round(millions / 1e6, 2) in (16.14, 39.52)


def test_presets_place_adapters_as_the_scripts_do() -> None:
    for preset, vision, text, words in (
        ("k400", ("mlp",), {11, 12}, ("mlp",)),
        ("ssv2", ("attn", "mlp"), set(range(13)), ("attn", "mlp")),
        ("paper", ("attn",), {11, 12}, ("attn",)),
    ):
        with torch.device("meta"):
            names = [name for name, _ in M2CLIP(M2CLIPConfig.preset(preset)).named_modules()]
        for half in ("attn", "mlp"):
            ends = f".adapter_pre_{half}"
            seen = [n for n in names if n.startswith("clip.visual.") and n.endswith(ends)]
            assert len(seen) == (12 if half in vision else 0)
            seen = [n for n in names if n.startswith("clip.text.") and n.endswith(ends)]
            assert {int(n.split(".")[4]) for n in seen} == (text if half in words else set())


def test_frozen_parameters_are_those_without_adapter_in_their_name() -> None:
    for name, parameter in tiny_model("ssv2").named_parameters():
        assert parameter.requires_grad is ("adapter" in name), name


def test_groups_halve_the_lr_of_text_adapters_and_spare_biases_the_decay() -> None:
    model = tiny_model("ssv2")
    names = {id(p): name for name, p in model.named_parameters()}
    groups = model.param_groups(1e-3, weight_decay=0.01)
    assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in model.parameters())
    for group in groups:
        for p in group["params"]:
            name = names[id(p)]
            assert group["lr"] == (5e-4 if "textad_" in name else 1e-3)
            assert group["weight_decay"] == (0.0 if name.endswith("bias") else 0.01)
    optimizer = torch.optim.AdamW(groups)
    model.losses(**batch())["total"].backward()
    optimizer.step()
    assert len(optimizer.state) == sum(p.requires_grad for p in model.parameters())


# -- forms of use --


def test_no_clips_give_empty_results_and_losses_of_zero() -> None:
    model = tiny_model()
    given = {name: t if name == "class_token_ids" else t[:0] for name, t in batch().items()}
    assert model(given["video"]).shape == (0, CLASSES)
    losses = model.losses(**given)
    assert {name: float(loss.detach()) for name, loss in losses.items()} == dict.fromkeys(losses, 0.0)
    losses["total"].backward()


def test_the_same_batch_gives_the_same_bits_twice() -> None:
    grads = []
    for _ in range(2):
        model = tiny_model()
        model.losses(**batch())["total"].backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("what", ["block", "mlp"])
def test_checkpointing_changes_no_gradient(what: str) -> None:
    grads = []
    for enable in (False, True):
        model = tiny_model("ssv2")
        model.set_grad_checkpointing(enable, what)
        model.losses(**batch())["total"].backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_bf16_autocast_trains() -> None:
    model, given = tiny_model("ssv2"), batch()
    exact = model.losses(**given)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.losses(**given)
    losses["total"].backward()
    for name in ("vc", "cmlm"):
        assert abs(float(losses[name].detach()) - float(exact[name].detach())) < 0.1, name
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.requires_grad and p.grad is not None)


def test_encode_video_compiles_whole() -> None:
    model, video = tiny_model("ssv2"), batch(2)["video"]
    compiled = torch.compile(lambda v: model.encode_video(v).class_logits, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(video), model(video), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["k400", "ssv2"])
def test_losses_and_gradients_on_a_gpu(preset: str) -> None:
    """fp32 on the device against the CPU's, to what TF32-free kernels differ; bf16 under autocast is finite and near."""
    exact, given = tiny_model(preset), batch()
    wanted = exact.losses(**given)
    wanted["total"].backward()
    model = tiny_model(preset).cuda()
    placed = {name: t.cuda() if name == "video" else t for name, t in given.items()}
    got = model.losses(**placed)
    got["total"].backward()
    for name in LOSSES:
        assert relative_error(got[name].cpu(), wanted[name]) < 1e-4, name
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        if p.requires_grad:
            assert p.grad is not None, name
            assert q.grad is not None, name
            assert float((p.grad.cpu() - q.grad).norm()) <= 1e-3 * max(float(q.grad.norm()), 1e-4), name
    with torch.autocast("cuda", torch.bfloat16):
        rough = model.losses(**placed)
    assert relative_error(rough["vc"].cpu(), wanted["vc"]) < 0.05


@pytest.mark.gpu
def test_ids_and_labels_may_lie_on_the_gpu() -> None:
    model, given = tiny_model().cuda(), {name: t.cuda() for name, t in batch().items()}
    host = {name: t.cpu() if name != "video" else t for name, t in given.items()}
    assert torch.equal(model.losses(**given)["total"], model.losses(**host)["total"])
