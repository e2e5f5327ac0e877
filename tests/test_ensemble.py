"""Micro-batches, memory that runs out, CUDA graphs, host-gathered pixels: the ways ensemble runs one and the same sum."""

from types import SimpleNamespace

import pytest
import torch
from numerics import relative_error
from plain import logits as plain_logits
from test_vit import clips, make
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from mmfast import sample_pack, tube_masks
from mmfast.config import from_name
from mmfast.ensemble import micro_batch_size, run_in_micro_batches, token_bytes, wave_aware_size
from mmfast.graphs import _graphs


def test_micro_batches_cover_every_clip_once() -> None:
    seen = run_in_micro_batches(lambda s: torch.arange(10)[s], 10, 4)
    assert torch.cat(seen).tolist() == list(range(10))


def test_out_of_memory_halves_the_micro_batch_and_says_so_once() -> None:
    sizes = []

    def run(clips: slice) -> torch.Tensor:
        sizes.append(clips.stop - clips.start)
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.arange(10)[clips]

    with pytest.warns(UserWarning, match="micro-batches of 4 clips") as caught:
        parts = run_in_micro_batches(run, 10, 8)
    assert torch.cat(parts).tolist() == list(range(10))
    assert sizes == [8, 4, 2, 2, 2, 2, 2]
    assert len(caught) == 1


def test_a_clip_that_does_not_fit_alone_is_an_error() -> None:
    def run(clips: slice) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.warns(UserWarning, match="micro-batches of 1"), pytest.raises(torch.OutOfMemoryError):
        run_in_micro_batches(run, 3, 2)


def test_other_errors_are_not_swallowed() -> None:
    def run(clips: slice) -> torch.Tensor:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        run_in_micro_batches(run, 3, 2)


@pytest.mark.parametrize(("tokens", "clips_"), [(392, 86), (2 * 392, 43), (784, 43), (384, 88), (1568, 21), (10**6, 1)])
def test_micro_batches_fill_the_waves_of_an_h200(tokens: int, clips_: int) -> None:
    assert wave_aware_size(tokens, 132) == clips_


@pytest.mark.parametrize("size", ["small", "base"])
@pytest.mark.parametrize("tokens", [392, 784, 10**6])
def test_micro_batches_by_the_l2_cache_fit_it(size: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    h200 = SimpleNamespace(multi_processor_count=132, L2_cache_size=60 * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h200)
    config = from_name(f"videomae_{size}_patch16_224")
    held = token_bytes(config, torch.bfloat16)
    assert held == 2 * 8 * config.embed_dim
    clips_ = micro_batch_size(tokens, torch.device("cuda"), held)
    assert clips_ == 1 or h200.L2_cache_size * 0.4 < clips_ * tokens * held < h200.L2_cache_size * 0.9
    assert clips_ < micro_batch_size(tokens, torch.device("cuda")) or clips_ == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(masks=torch.zeros(2, 64, dtype=torch.bool)), ValueError, r"masks must be \[2, P, 64\], got \(2, 64\)"),
        (dict(masks=torch.zeros(2, 1, 64)), TypeError, "float32"),
        (dict(masks=torch.ones(2, 1, 64, dtype=torch.bool)), ValueError, "removes every token"),
        (dict(micro_batch=0), ValueError, "micro_batch"),
        (dict(micro_batch="L3"), ValueError, "at least 1, or \"l2\", got 'L3'"),
        (dict(views=0), ValueError, "views"),
        (dict(keep=17), ValueError, "keep"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message) -> None:
    model = make()
    with pytest.raises(error, match=message):
        model.ensemble(clips(model), **arguments)


def test_nothing_is_read_back_between_mask_parameters_and_probabilities() -> None:
    """Fake tensors hold no data: whatever asked for a value, and so would wait for a GPU, raises."""
    model = make()
    with FakeTensorMode(allow_non_fake_inputs=True):
        pack = sample_pack(3, 2, model.config.grid, 0.75)
        assert pack.clip_idx.shape == pack.keep_idx.shape == (3 * 2 * 16,)
        video = torch.zeros(3, 3, 8, 64, 64, dtype=torch.uint8)
        assert model.ensemble(video, 2, 0.75).shape == (3, 7)
        with pytest.raises(DataDependentOutputException):  # the counts of a given mask have to be read
            model(video, torch.zeros(3, 64, dtype=torch.bool))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["float", "uint8", "decoder-layout"])
@pytest.mark.parametrize("place", ["cuda", "host"])
def test_gpu_ensemble_equals_the_published_model(place: str, kind: str, dtype: torch.dtype) -> None:
    model = make(embed_dim=128, num_heads=2)
    c = model.config
    raw = torch.randint(0, 256, clips(model, 5).shape, dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (c.mean, c.std))
    normalised = (raw / 255 - mean) / std
    masks = tube_masks(5, 3, c.grid, 0.75, seed=2)
    state = model.state_dict()

    def probs(state, video, masks):
        return torch.stack([plain_logits(c, state, video, m).softmax(-1) for m in masks.unbind(1)]).mean(0)

    with torch.no_grad():
        truth = probs({k: v.double() for k, v in state.items()}, normalised.double(), masks)
        on_gpu = {k: v.to("cuda", dtype) for k, v in state.items()}
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            plain = probs(on_gpu, normalised.to("cuda", dtype), masks.cuda()).cpu()
    video = {"float": normalised, "uint8": raw, "decoder-layout": raw.permute(0, 2, 3, 4, 1).contiguous()}[kind]
    video = video.permute(0, 4, 1, 2, 3) if kind == "decoder-layout" else video
    model = model.to("cuda", dtype)
    allowed = 2 * relative_error(plain, truth) + 1e-5
    for _ in range(3):  # eager, captured, replayed
        got = model.ensemble(video.to("cuda") if place == "cuda" else video, 3, 0.75, seed=2)
        assert relative_error(got.cpu(), truth) <= allowed
    assert any(c is not None for c in _graphs[model].values())


@pytest.mark.gpu
def test_graph_follows_new_inputs_and_weights_changed_in_place() -> None:
    model = make(embed_dim=128, num_heads=2).cuda()
    for seed in range(4):
        video = clips(model, 3, seed=seed).cuda()
        got = model.ensemble(video, 2, 0.5, seed=seed)
        with torch.no_grad():
            expected = model(video, tube_masks(3, 2, model.config.grid, 0.5, seed=seed).cuda()).softmax(-1).mean(1)
            assert relative_error(got, expected) <= 1e-5
            model.head.weight.mul_(1.1)


@pytest.mark.gpu
def test_graph_made_in_inference_mode_is_not_replayed_outside() -> None:
    model = make(embed_dim=128, num_heads=2).cuda()
    video = clips(model, 3).cuda()
    with torch.inference_mode():
        inside = [model.ensemble(video) for _ in range(3)]
    outside = [model.ensemble(video) for _ in range(3)]
    for got in inside + outside:
        torch.testing.assert_close(got, inside[0])


@pytest.mark.gpu
def test_graph_on_clips_that_share_memory() -> None:
    model = make(embed_dim=128, num_heads=2).cuda()
    video = clips(model, 1).cuda().expand(3, -1, -1, -1, -1)
    expected = model.ensemble(video.contiguous())
    for _ in range(3):
        torch.testing.assert_close(model.ensemble(video), expected)


@pytest.mark.gpu
def test_nothing_waits_for_the_device_between_mask_parameters_and_probabilities() -> None:
    model = make(embed_dim=128, num_heads=2).cuda()
    video = clips(model, 3).cuda()
    model.ensemble(video)
    model.ensemble(video)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.ensemble(video)  # a replayed graph
        model.ensemble(video[:2])  # a first run
    finally:
        torch.cuda.set_sync_debug_mode("default")
