"""quantize_int8: how near the fp32 model it stays, that it undoes itself, and what it refuses."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from makers import canonical, tiny_config
from numerics import relative_error
from torch import Tensor, nn

from mmfast import random_masks, tube_masks
from mmfast.vit import MaskedViT

GRID = (2, 2, 2)


def model_of(**overrides: object) -> MaskedViT:
    config = tiny_config(**overrides)
    model = MaskedViT(config)
    model.load_state_dict(canonical(config))
    return model.eval()


def clips(batch: int = 3) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 3, 4, 32, 32), generator=draw, dtype=torch.uint8)


def masks(batch: int = 3, views: int = 2) -> Tensor:
    return tube_masks(batch, views=views, grid=GRID, mask_ratio=0.5)


def rounded(weight: Tensor) -> Tensor:
    """A weight matrix as int8 holds it."""
    step = weight.abs().amax(1, keepdim=True) / 127
    return (weight / step).round() * step


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


VARIANTS = {
    "VideoMAE": {},
    "biases": {"qkv_bias": "full"},
    "LayerScale": {"init_values": 0.1},
    "QuickGELU": {"gelu": "quick"},
    "tanh": {"gelu": "tanh"},
    "odd widths": {"embed_dim": 48, "mlp_ratio": 1.5, "num_heads": 3},
    "width that C++ does not take": {"embed_dim": 40, "num_heads": 2},
    "adapters": {"adapter_hidden": 8, "adapter_before": ("attn", "mlp")},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_stay_near_those_in_fp32(variant: str, poisoned_empty: None) -> None:
    model = model_of(**VARIANTS[variant])
    wanted = model.encode(clips(), masks())
    got = model.quantize_int8().encode(clips(), masks())
    assert 0 < relative_error(got, wanted) < 0.02


def test_it_is_the_model_of_rounded_weights_and_activations() -> None:
    """The fp32 model of the rounded weights, with hooks that round what enters each layer, to rounding of the sums."""
    model = model_of(gelu="erf")
    got = copy.deepcopy(model).quantize_int8().encode(clips(), masks())
    plain = PlainInt8(model)
    assert relative_error(got, plain(clips(), masks())) < 2e-3


class PlainInt8:
    """Every Linear of the blocks replaced by one in float64 on rounded rows and rounded weights."""

    def __init__(self, model: MaskedViT) -> None:
        self.model = model

    def __call__(self, video: Tensor, mask: Tensor) -> Tensor:
        model = self.model
        pack, lead = model.pack(video, mask)
        x = model.embed(video, pack).double()
        for block in model.blocks:
            h = nn.functional.layer_norm(x, x.shape[1:], block.norm1.weight.double(), block.norm1.bias.double(), 1e-6)
            heads = self.layer(h, block.attn.qkv.weight, block.attn.joint_bias())
            q, k, v = heads.view(pack.num_sequences, pack.length, 3, block.attn.num_heads, -1).permute(2, 0, 3, 1, 4)
            out = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
            x = x + self.layer(out, block.attn.proj.weight, block.attn.proj.bias)
            h = nn.functional.layer_norm(x, x.shape[1:], block.norm2.weight.double(), block.norm2.bias.double(), 1e-6)
            hidden = nn.functional.gelu(self.layer(h, block.mlp.fc1.weight, block.mlp.fc1.bias))
            x = x + self.layer(hidden, block.mlp.fc2.weight, block.mlp.fc2.bias)
        return model._pool((x.float(), torch.zeros_like(x, dtype=torch.float32)), pack).unflatten(0, lead)

    def layer(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = rounded(x) @ rounded(weight.double()).t()
        return y if bias is None else y + bias.double()


def test_ensemble_of_micro_batches_is_that_of_all() -> None:
    model = model_of().quantize_int8()
    together = model.ensemble(clips(), views=3, mask_ratio=0.5)
    apart = model.ensemble(clips(), views=3, mask_ratio=0.5, micro_batch=1)
    torch.testing.assert_close(together, apart)
    torch.testing.assert_close(together.sum(1), torch.ones(3))


def test_more_tokens_than_a_block_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of().quantize_int8()
    wanted = model.encode(clips(), masks())
    monkeypatch.setattr("mmfast.quantize.ROWS", 5)
    assert torch.equal(model.encode(clips(), masks()), wanted)


def test_views_of_unequal_lengths() -> None:
    model = model_of()
    mask = torch.cat((random_masks(2, views=1, grid=GRID, mask_ratio=0.25), tube_masks(2, views=1, grid=GRID)), 1)
    wanted = model.forward_packed(clips(2), mask).tokens
    assert relative_error(model.quantize_int8().forward_packed(clips(2), mask).tokens, wanted) < 0.02


def test_no_clips() -> None:
    assert model_of().quantize_int8()(clips(0)).shape == (0, 5)


def test_intermediate_tokens_and_the_stream() -> None:
    model = model_of()
    (_, wanted), streamed = model.forward_intermediates(clips(), masks()), list(model.stream(clips(), last=2))
    model.quantize_int8()
    _, got = model.forward_intermediates(clips(), masks())
    assert all(relative_error(a, b) < 0.02 for a, b in zip(got, wanted, strict=True))
    for made, right in zip(model.stream(clips(), last=2), streamed, strict=True):
        assert all(relative_error(a, b) < 0.02 for a, b in zip(made, right, strict=True))


def test_dequantize_gives_back_the_same_bits() -> None:
    model = model_of()
    wanted = model(clips(), masks())
    assert not torch.equal(model.quantize_int8()(clips(), masks()), wanted)
    assert model.is_int8
    assert torch.equal(model.dequantize()(clips(), masks()), wanted)
    assert not model.is_int8


def test_the_state_dict_and_what_is_saved_are_in_fp32(tmp_path: Path) -> None:
    model = model_of()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    model.quantize_int8().save_pretrained(tmp_path)
    loaded = MaskedViT.from_pretrained(tmp_path).state_dict()
    assert state.keys() == model.state_dict().keys() == loaded.keys()
    assert all(torch.equal(loaded[name], t) for name, t in state.items())


def test_a_copy_runs_too() -> None:
    model = model_of().quantize_int8()
    assert torch.equal(copy.deepcopy(model)(clips()), model(clips()))


def test_nan_in_one_clip_stays_there() -> None:
    model = model_of().quantize_int8()
    video = torch.randn(3, 3, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    video[1] = torch.nan
    logits = model(video)
    assert logits[1].isnan().all()
    assert logits[[0, 2]].isfinite().all()


def test_training_is_refused() -> None:
    model = model_of().quantize_int8()
    with pytest.raises(ValueError, match=r"train: the model is in int8; call dequantize\(\) first"):
        model.train()
    assert not model.training
    with torch.enable_grad(), pytest.raises(ValueError, match="no gradients"):
        model(clips())
    model.dequantize().train()


def test_fusing_it_is_refused_and_so_is_quantizing_a_fused_model() -> None:
    model = model_of().quantize_int8()
    with pytest.raises(ValueError, match="fuse_for_inference: the model is in int8"):
        model.fuse_for_inference()
    model.dequantize().fuse_for_inference()
    with pytest.raises(ValueError, match="call unfuse first"):
        model.quantize_int8()


def test_weights_that_change_afterwards_are_refused() -> None:
    model = model_of().quantize_int8()
    model.load_state_dict(canonical(model.config, seed=1))
    with pytest.raises(ValueError, match="weights have changed since quantize_int8"):
        model(clips())
    got = model.quantize_int8()(clips())
    assert relative_error(got, model.dequantize()(clips())) < 0.02


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"fp32 on the CPU, .* is torch.bfloat16"):
        model_of().bfloat16().quantize_int8()
    model = model_of().quantize_int8()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="without autocast"):
        model(clips())
    with pytest.raises(ValueError, match=r"fp32 on the CPU without autocast, got torch.bfloat16"):
        model.bfloat16()(clips().bfloat16())


@pytest.mark.gpu
def test_a_model_on_the_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="is torch.float32 on cuda"):
        model_of().cuda().quantize_int8()
    with pytest.raises(ValueError, match="in fp32 on the CPU without autocast, got torch.float32 on cuda"):
        model_of().quantize_int8().cuda()(clips().cuda())


def test_inference_mode() -> None:
    with torch.inference_mode():
        model = model_of().quantize_int8()
        assert relative_error(model(clips()), model.dequantize()(clips())) < 0.02


def test_torch_compile_takes_it_in_one_graph() -> None:
    model = model_of().quantize_int8()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(clips()), model(clips()))
