"""Few-shot adaptation with EVL's decoder: the logistic head's result before the first step, and better after."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from evl_makers import CLIP_TOWERS, VIT
from evl_makers import tiny_model as tiny_evl
from makers import tiny_config as tiny_vit
from test_peft import Clips, small, state, supports
from torch import Tensor
from torch.nn import functional as F

from mmfast import CLIP, EVL, EVLConfig, MaskedViT, tube_masks
from mmfast.episodes import EpisodeResult, evaluate_fresh
from mmfast.evl_fewshot import DecoderAdaptation, FewShotDecoder, evaluate_decoded
from mmfast.fewshot import LogisticRegression
from mmfast.masks import Pack, sample_pack
from mmfast.peft import Adaptation, evaluate_adapted

# test_peft's clips are four frames of 32 x 32.
CLIP_32 = replace(CLIP_TOWERS, image_size=32)


def vit(**changes: Any) -> MaskedViT:
    torch.manual_seed(0)
    return MaskedViT(tiny_vit(**changes))


def clip() -> CLIP:
    torch.manual_seed(0)
    return CLIP(CLIP_32).eval()


FRAMES = {vit: None, clip: 4}


def evl() -> EVL:
    model = vit(num_classes=0)
    torch.manual_seed(1)
    return EVL(EVLConfig(model.config, num_layers=2, num_classes=7), model)


# -- one episode ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_without_steps_it_is_the_published_logistic_head(ratio: float) -> None:
    net, episodes = vit(), small(episodes=20)
    fresh = evaluate_fresh(net, Clips(), episodes, 1, ratio, 3, progress=False)
    found = evaluate_decoded(net, Clips(), episodes, 1, ratio, 3, how=DecoderAdaptation(steps=0), progress=False)
    assert torch.equal(found.number, fresh.number)
    assert torch.equal(found.correct, fresh.correct)


def test_without_steps_all_views_are_the_adapters_start() -> None:
    net, episodes = vit(pool="first", final_norm=True), small(episodes=10)
    adapted = evaluate_adapted(net, Clips(), episodes, 2, 0.5, 3, how=Adaptation(steps=0), progress=False)
    found = evaluate_decoded(net, Clips(), episodes, 2, 0.5, 3, how=DecoderAdaptation(steps=0), progress=False)
    assert torch.equal(found.correct, adapted.correct)


def test_of_a_clip_the_start_is_the_head_on_the_mean_of_its_frames() -> None:
    net = clip()
    tuned = FewShotDecoder(net, DecoderAdaptation(layers=1, num_frames=4, steps=0))
    video, ids, labels = supports()
    tuned.fit(video, ids, labels, 2, 0.5, 4)
    pack = sample_pack(len(ids), 2, (4, 4, 4), 0.5, seed=4, clip_ids=ids)
    with torch.no_grad():
        frames = list(net.visual.stream(video, pack))[-1][0].view(12, 4, 9, -1)[:, :, 0]
        features = net.visual.ln_post(frames, frames.dtype).mean(1)
    wanted = LogisticRegression(0.5).fit(features[None], labels.repeat_interleave(2)[None])
    torch.testing.assert_close(tuned.weight, wanted.weight[0].float(), rtol=1e-4, atol=1e-5)
    probabilities = wanted.predict_proba(features[None])[0].unflatten(0, (-1, 2)).mean(1)
    torch.testing.assert_close(tuned.predict_proba(video, ids, 2, 0.5, 4), probabilities.float())


@pytest.mark.parametrize("net", [vit, clip])
def test_steps_lower_the_objective(net: Any) -> None:
    video, ids, labels = supports()
    losses = []
    for steps in (0, 30):
        tuned = FewShotDecoder(
            net(), DecoderAdaptation(steps=steps, layers=2, num_frames=FRAMES[net], lr=1e-3, head_lr=1e-2)
        )
        tuned.fit(video, ids, labels, 1, 0.0)
        fit = F.nll_loss(tuned.predict_proba(video, ids, 1, 0.0).log(), labels)
        squares = tuned.weight.square().sum() + tuned.evl.proj[2].weight.detach().square().sum()
        losses.append(float(fit + squares / (2 * len(labels))))
    assert losses[1] < 0.8 * losses[0]


def test_what_is_predicted_is_head_and_decoder_together() -> None:
    tuned = FewShotDecoder(vit(), DecoderAdaptation(steps=5, lr=1e-3, head_lr=1e-2))
    video, ids, labels = supports()
    tuned.fit(video, ids, labels, 2, 0.5)
    mask = tube_masks(len(ids), 2, tuned.evl.check_video(video), 0.5, seed=8, clip_ids=ids)
    with torch.no_grad():
        logits = tuned.evl.backbone.encode(video, mask) @ tuned.weight.t() + tuned.evl(video, mask)
    torch.testing.assert_close(tuned.predict_proba(video, ids, 2, 0.5, 8), logits.softmax(-1).mean(1))
    assert float(tuned.evl.proj[2].weight.detach().abs().max()) > 1e-3


@pytest.mark.parametrize(("draws", "steps", "calls"), [(1, 6, 1), (3, 6, 3), (9, 6, 6), (5, 0, 1)])
def test_the_backbone_runs_once_for_each_draw_whatever_the_steps(draws: int, steps: int, calls: int) -> None:
    tuned, seen = FewShotDecoder(vit(), DecoderAdaptation(steps=steps, draws=draws)), []
    stream = tuned.evl.backbone.stream

    def listens(video: Tensor, pack: Pack, last: int) -> Any:
        seen.append(str(pack.keep_idx.tolist()))
        return stream(video, pack, last)

    tuned.evl.backbone.stream = listens
    tuned.fit(*supports(), 2, 0.75)
    assert len(seen) == len(set(seen)) == calls


def test_each_fit_starts_anew_and_the_backbone_stays() -> None:
    tuned = FewShotDecoder(vit(), DecoderAdaptation(steps=3, dropout=0.2))
    video, ids, labels = supports()
    before = state(tuned.evl)  # type: ignore[arg-type]  # any module has a state

    def fitted() -> list[Tensor]:
        tuned.fit(video, ids, labels, 2, 0.5)
        return [tuned.weight, *state(tuned.evl).values()]  # type: ignore[arg-type]

    first = fitted()
    now = {name: t for name, t in tuned.evl.state_dict().items() if not name.startswith("proj.2.")}
    moved = {name for name, t in now.items() if not torch.equal(t, before[name])}
    assert moved
    assert not any(name.startswith("backbone.") for name in moved)
    tuned.fit(video.flip(0), ids, labels, 2, 0.5, seed=9)
    assert all(torch.equal(a, b) for a, b in zip(first, fitted(), strict=True))


def test_a_decoder_that_is_there_is_where_every_episode_starts() -> None:
    net = evl()
    with torch.no_grad():
        for p in net.decoder.parameters():
            p.add_(0.1 * torch.randn_like(p))
        net.proj[0].weight.normal_()
    tuned = FewShotDecoder(net, DecoderAdaptation(steps=2))
    tuned.fit(*supports())
    tuned.how = DecoderAdaptation(steps=0)
    tuned.fit(*supports())
    assert all(torch.equal(p, net.decoder.get_parameter(n)) for n, p in tuned.evl.decoder.named_parameters())
    assert torch.equal(tuned.evl.proj[0].weight, net.proj[0].weight)
    assert net.config.num_classes == 7


def test_temporal_modules_are_those_asked_for() -> None:
    tuned = FewShotDecoder(vit(), DecoderAdaptation(temporal=("positions",), layers=1))
    names = {name.split(".")[0] for name, _ in tuned.evl.decoder.named_parameters()}
    assert names == {"cls_token", "decoder_layers", "temporal_pos_embed"}
    assert tuned.num_parameters == sum(p.numel() for p in tuned.evl.decoder.parameters()) + 2 * tuned.evl.config.width


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adaptation_in_half_precision(dtype: torch.dtype) -> None:
    video, ids, labels = supports()
    found = []
    for kind in (dtype, None):
        tuned = FewShotDecoder(vit(), DecoderAdaptation(steps=3, dropout=0.0))
        tuned.fit(video, ids, labels, 2, 0.5, 0, kind)
        found.append(tuned.predict_proba(video, ids, 2, 0.5, 0, kind))
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(*found, rtol=0.05, atol=0.03)


@pytest.mark.gpu
def test_adaptation_on_a_gpu_is_that_of_the_cpu() -> None:
    video, ids, labels = supports()
    found = []
    for device in ("cpu", "cuda"):
        tuned = FewShotDecoder(vit().to(device), DecoderAdaptation(steps=5, dropout=0.0))
        tuned.fit(video, ids, labels, 2, 0.5)
        found.append(tuned.predict_proba(video, ids, 2, 0.5).cpu())
    torch.testing.assert_close(*found, rtol=0.02, atol=0.01)


# -- many episodes --------------------------------------------------------------------------------------------------


def test_the_model_stays_as_it_is() -> None:
    net = vit().train()
    before = state(net)
    evaluate_decoded(net, Clips(), small(episodes=2), 2, 0.5, how=DecoderAdaptation(steps=2), progress=False)
    assert net.training
    assert all(p.requires_grad for p in net.parameters())
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_shards_give_the_result_of_one() -> None:
    net, how = vit(), DecoderAdaptation(steps=3, dropout=0.5)
    whole = evaluate_decoded(net, Clips(), small(), 2, 0.5, 1, how=how, progress=False)
    torch.rand(7)  # what else the process draws must not matter
    parts = [evaluate_decoded(net, Clips(), small().shard(r, 2), 2, 0.5, 1, how=how, progress=False) for r in (1, 0)]
    assert torch.equal(EpisodeResult.merge(parts).correct, whole.correct)


def test_dropout_leaves_the_draws_of_others_alone() -> None:
    net = vit()
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    FewShotDecoder(net, DecoderAdaptation(steps=2, dropout=0.5)).fit(*supports())
    assert torch.equal(torch.rand(4), wanted)


def test_the_decoder_learns_what_the_frozen_features_hide() -> None:
    """Random features of a ViT know little of motion when they are pooled; the decoder sees them unpooled, over time."""
    net, episodes = vit(), small(k_shot=4, n_query=4, episodes=3)
    frozen = evaluate_decoded(net, Clips(), episodes, 2, 0.0, how=DecoderAdaptation(steps=0), progress=False)
    how = DecoderAdaptation(steps=60, lr=3e-3, head_lr=1e-2, dropout=0.0)
    adapted = evaluate_decoded(net, Clips(), episodes, 2, 0.0, how=how, progress=False)
    gain, _ = adapted.difference(frozen)
    assert gain > 0.1, (frozen.mean, adapted.mean)


# -- what it refuses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [{"steps": -1}, {"lr": 0.0}, {"head_lr": 0.0}, {"weight_decay": -1.0}, {"C": 0.0}, {"dropout": 1.0}, {"draws": 0}]
    + [{"layers": 0}, {"num_frames": 0}],
    ids=str,
)
def test_bad_settings_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must"):
        DecoderAdaptation(**wrong)
    with pytest.raises(ValueError, match="temporal must be some of conv, positions, attention, got 'tca'"):
        DecoderAdaptation(temporal=("tca",))


def test_another_model_or_depth_is_refused() -> None:
    with pytest.raises(TypeError, match="must be an EVL or its backbone, got Linear"):
        FewShotDecoder(torch.nn.Linear(2, 2))  # type: ignore[arg-type]  # what a caller may pass
    with pytest.raises(ValueError, match="layers must be None or 2, as in the decoder there is, got 3"):
        FewShotDecoder(tiny_evl("vit"), DecoderAdaptation(layers=3))
    with pytest.raises(ValueError, match="num_layers must be at most 3, the backbone's blocks, got 4"):
        FewShotDecoder(MaskedViT(VIT), DecoderAdaptation(layers=4))
    with pytest.raises(ValueError, match="has not been fitted"):
        FewShotDecoder(vit()).predict_proba(*supports()[:2])


@pytest.mark.parametrize(
    ("change", "message"),
    [({"views": 0}, "views must"), ({"mask_ratio": 1.0}, "mask_ratio must"), ({"modality": "flow"}, "modality must")],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_decoded(vit(), Clips(), small(), progress=False, **change)
