"""The benchmark's counts, against torch's own counter and against the figures printed for the published system."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmfast.config import ViTConfig, from_name

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import flops
import peers

VIT_S = from_name("videomae_small_patch16_224", num_classes=204)
TINY = ViTConfig(
    img_size=12, patch_size=4, num_frames=4, embed_dim=24, depth=2, num_heads=3, mlp_ratio=2.0, num_classes=5
)
KEPT = 3  # tubes of a view in the tiny model


def random_state(config: ViTConfig) -> dict[str, torch.Tensor]:
    D, hidden = config.embed_dim, config.mlp_dim
    patch = (config.in_chans, config.tubelet_size, config.patch_size, config.patch_size)
    shapes: dict[str, tuple[int, ...]] = {"patch_embed.proj.weight": (D, *patch), "patch_embed.proj.bias": (D,)}
    for i in range(config.depth):
        for norm in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{norm}.weight": (D,), f"blocks.{i}.{norm}.bias": (D,)}
        shapes |= {f"blocks.{i}.attn.qkv.weight": (3 * D, D), f"blocks.{i}.attn.q_bias": (D,)}
        shapes |= {f"blocks.{i}.attn.v_bias": (D,), f"blocks.{i}.attn.proj.weight": (D, D)}
        shapes |= {f"blocks.{i}.attn.proj.bias": (D,), f"blocks.{i}.mlp.fc1.weight": (hidden, D)}
        shapes |= {f"blocks.{i}.mlp.fc1.bias": (hidden,), f"blocks.{i}.mlp.fc2.weight": (D, hidden)}
        shapes |= {f"blocks.{i}.mlp.fc2.bias": (D,)}
    shapes |= {"fc_norm.weight": (D,), "fc_norm.bias": (D,)}
    shapes |= {"head.weight": (config.num_classes, D), "head.bias": (config.num_classes,)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * shape[-1] ** -0.5 for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def tiny() -> peers.PlainViT:
    return peers.PlainViT(random_state(TINY), TINY)


@pytest.fixture(scope="module")
def clips() -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 video as a decoder lays it out, and masks of P = 2 views."""
    generator = torch.Generator().manual_seed(1)
    frames = torch.randint(0, 256, (2, 4, 12, 12, 3), dtype=torch.uint8, generator=generator)
    order = torch.rand(2, 2, 9, generator=generator).argsort(-1)
    masks = torch.ones(2, 2, 9, dtype=torch.bool).scatter_(2, order[..., :KEPT], False).repeat(1, 1, 2)
    return frames.permute(0, 4, 1, 2, 3), masks


def counted(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("n", "views", "convention", "gflop"),
    [
        pytest.param(1568, 1, "published", 68.44, id="full-published"),
        pytest.param(1568, 1, "true", 113.8, id="full-true"),
        pytest.param(392, 2, "published", 36.99, id="masked-published"),
        pytest.param(392, 2, "true", 42.7, id="masked-true"),
    ],
)
def test_figures_of_the_published_system(n, views, convention, gflop):
    digits = 2 if convention == "published" else 1
    assert round(getattr(flops.count(VIT_S, n, views), convention) / 1e9, digits) == gflop


def test_published_path_multiplies_what_is_counted(tiny, clips):
    video, masks = clips
    expected = video.shape[0] * flops.count(TINY, 2 * KEPT, views=2).true
    assert counted(lambda: tiny.published(video, masks)) == expected


def test_strong_baseline_multiplies_what_is_counted(tiny, clips):
    video, masks = clips
    keep = peers.kept_ids(masks)
    expected = video.shape[0] * flops.count(TINY, 2 * KEPT, views=2, embedded=2 * KEPT).true
    assert counted(lambda: tiny.strong(video, keep, peers.materialised_attention)) == expected


def test_bare_products_multiply_what_is_counted():
    run = flops.bare_products(TINY, 4, 2 * KEPT, device="cpu", dtype=torch.float32, product=flops.by_mm)
    expected = 2 * flops.count(TINY, 2 * KEPT, views=2, embedded=2 * KEPT).true
    assert counted(run) == expected


def test_least_bytes_of_a_layer_by_hand():
    """26 D elements a token and layer at mlp_ratio 4, in bf16, beside the pixels, the embedding and the weights."""
    one, two = (replace(VIT_S, depth=depth) for depth in (1, 2))
    layer = flops.least_bytes(two, 8, 392, 2) - flops.least_bytes(one, 8, 392, 2)
    assert layer == 8 * 392 * 26 * 384 * 2 + 12 * 384 * 384 * 2
    uint8, fp32 = (flops.least_bytes(one, 8, 392, 2, size) for size in (1, 4))
    assert fp32 - uint8 == 3 * 8 * 392 * 1536


def test_strong_baseline_equals_published(tiny, clips):
    video, masks = clips
    published, strong = tiny.published(video, masks), tiny.strong(video, peers.kept_ids(masks))
    assert (published - strong).norm() / published.norm() <= 1e-6


def test_published_views_are_averaged_probabilities(tiny, clips):
    video, masks = clips
    single = [tiny.published(video, masks[:, p : p + 1]) for p in range(2)]
    assert torch.equal(tiny.published(video, masks), torch.stack(single).mean(0))


def test_transformers_equals_published(tiny, clips):
    pytest.importorskip("transformers")
    video, masks = clips
    published, theirs = tiny.published(video, masks), peers.HuggingFace(tiny, TINY).published(video, masks)
    assert (published - theirs).norm() / published.norm() <= 1e-6


def test_positions_at_hand_computed_places():
    table = peers.sinusoid(10, 6)
    place = torch.tensor(7.0 / 10000 ** (2 / 6), dtype=torch.float64)
    assert torch.allclose(table[7, 2:4], torch.stack((place.sin(), place.cos())).float(), atol=1e-7)
    assert table[0].tolist() == [0, 1, 0, 1, 0, 1]


def test_unknown_weight_is_refused():
    state = random_state(TINY) | {"blocks.0.gamma_1": torch.ones(24)}
    with pytest.raises(ValueError, match="gamma_1"):
        peers.PlainViT(state, TINY)


def test_unequal_masks_are_refused(clips):
    masks = clips[1].clone()
    masks[0, 0, masks[0, 0].nonzero()[0]] = False
    with pytest.raises(ValueError, match="same number of tokens"):
        peers.kept_ids(masks)
