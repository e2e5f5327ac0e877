"""quantize_fp8: how near the model it stays, that it undoes itself, and what it refuses."""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from command_runs import run, write_checkpoint, write_labelled
from makers import canonical, tiny_config
from numerics import relative_error
from torch import Tensor, nn

from mmfast import tube_masks
from mmfast.extract import FeatureStore
from mmfast.graphs import _key
from mmfast.vit import MaskedViT
from mmfast_kernels import fp8

GRID = (2, 2, 2)
ALL = ("qkv", "proj", "mlp")
NEAR = 0.06  # e4m3 has 4 bits


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


def rounded(x: Tensor) -> Tensor:
    """The rows of x as e4m3 with a scale of their own holds them."""
    scale = x.abs().amax(1, keepdim=True) / 448
    return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


VARIANTS = {
    "VideoMAE": {},
    "biases": {"qkv_bias": "full"},
    "LayerScale": {"init_values": 0.1},
    "QuickGELU": {"gelu": "quick"},
    "odd widths": {"embed_dim": 48, "mlp_ratio": 1.0, "num_heads": 3},
    "adapters": {"adapter_hidden": 8, "adapter_before": ("attn", "mlp")},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layers", [("qkv",), ("proj",), ("mlp",), ALL], ids="-".join)
def test_features_stay_near(variant: str, layers: Sequence[str], poisoned_empty: None) -> None:
    model = model_of(**VARIANTS[variant])
    wanted = model.encode(clips(), masks())
    got = model.quantize_fp8(layers).encode(clips(), masks())
    assert 0 < relative_error(got, wanted) < NEAR


@pytest.mark.parametrize("layers", [("qkv",), ("proj",), ("mlp",), ALL], ids="-".join)
@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_it_is_the_model_of_rounded_weights_and_activations(layers: Sequence[str], gamma: float) -> None:
    model = model_of(gelu="tanh", init_values=gamma)
    got = copy.deepcopy(model).quantize_fp8(layers).encode(clips(), masks())
    wanted = plain(model, clips(), masks(), layers)
    # A number near the middle of two of e4m3 may go either way, and the hidden layer's rows have another scale.
    bar = 0.25 if "mlp" in layers else 0.1
    exact = model.encode(clips(), masks())
    assert relative_error(got, wanted) < bar * NEAR
    assert relative_error(got, exact) > 0


def plain(model: MaskedViT, video: Tensor, mask: Tensor, layers: Sequence[str]) -> Tensor:
    """The model in float64 with rounded rows and rounded weights in the layers named."""

    def layer(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = weight.double()
        y = rounded(x) @ rounded(weight).t() if name in layers else x @ weight.t()
        return y if bias is None else y + bias.double()

    def norm(x: Tensor, of: nn.LayerNorm) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[1:], of.weight.double(), of.bias.double(), of.eps)

    pack, lead = model.pack(video, mask)
    x = model.embed(video, pack).double()
    for block in model.blocks:
        first, second = (1 if g is None else g.double() for g in (block.gamma_1, block.gamma_2))
        heads = layer("qkv", norm(x, block.norm1), block.attn.qkv.weight, block.attn.joint_bias())
        q, k, v = heads.view(pack.num_sequences, pack.length, 3, block.attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + first * layer("proj", out, block.attn.proj.weight, block.attn.proj.bias)
        hidden = layer("mlp", norm(x, block.norm2), block.mlp.fc1.weight, block.mlp.fc1.bias)
        x = x + second * layer("mlp", nn.functional.gelu(hidden), block.mlp.fc2.weight, block.mlp.fc2.bias)
    return model._pool((x.float(), None), pack).unflatten(0, lead)


def test_under_autocast_the_stream_keeps_its_dtype() -> None:
    model = model_of()
    wanted = model.encode(clips(), masks())
    with torch.autocast("cpu", torch.bfloat16):
        plain_dtype = model.encode(clips(), masks()).dtype
        got = model.quantize_fp8(ALL).encode(clips(), masks())
    assert got.dtype == plain_dtype
    assert relative_error(got, wanted) < NEAR


def test_weights_in_half_precision() -> None:
    model = model_of()
    wanted = model.encode(clips(), masks())
    got = model.bfloat16().quantize_fp8(ALL).encode(clips(), masks())
    assert got.dtype == torch.bfloat16
    assert relative_error(got, wanted) < NEAR


def test_ensemble_of_micro_batches_is_that_of_all() -> None:
    model = model_of().quantize_fp8(ALL)
    together = model.ensemble(clips(), views=3, mask_ratio=0.5)
    apart = model.ensemble(clips(), views=3, mask_ratio=0.5, micro_batch=1)
    torch.testing.assert_close(together, apart, rtol=0.02, atol=1e-3)
    torch.testing.assert_close(together.sum(1), torch.ones(3))


def test_no_clips() -> None:
    assert model_of().quantize_fp8()(clips(0)).shape == (0, 5)


def test_intermediate_tokens_and_the_stream() -> None:
    model = model_of()
    (_, wanted), streamed = model.forward_intermediates(clips(), masks()), list(model.stream(clips(), last=2))
    model.quantize_fp8(ALL)
    _, got = model.forward_intermediates(clips(), masks())
    assert all(relative_error(a, b) < NEAR for a, b in zip(got, wanted, strict=True))
    for made, right in zip(model.stream(clips(), last=2), streamed, strict=True):
        assert all(relative_error(a, b) < NEAR for a, b in zip(made, right, strict=True))


def test_dequantize_gives_back_the_same_bits() -> None:
    model = model_of()
    wanted = model(clips(), masks())
    assert not torch.equal(model.quantize_fp8()(clips(), masks()), wanted)
    assert model.quantized == "fp8"
    assert torch.equal(model.dequantize()(clips(), masks()), wanted)
    assert model.quantized is None


def test_what_is_saved_are_the_weights_themselves(tmp_path: Path) -> None:
    model = model_of()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    model.quantize_fp8().save_pretrained(tmp_path)
    loaded = MaskedViT.from_pretrained(tmp_path).state_dict()
    assert state.keys() == loaded.keys()
    assert all(torch.equal(loaded[name], t) for name, t in state.items())


def test_a_copy_runs_too() -> None:
    model = model_of().quantize_fp8()
    assert torch.equal(copy.deepcopy(model)(clips()), model(clips()))


def test_nan_in_one_clip_stays_there() -> None:
    model = model_of().quantize_fp8(ALL)
    video = torch.randn(3, 3, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    video[1] = torch.nan
    logits = model(video)
    assert logits[1].isnan().all()
    assert logits[[0, 2]].isfinite().all()


def test_training_is_refused() -> None:
    model = model_of().quantize_fp8()
    with pytest.raises(ValueError, match=r"train: the model is in fp8; call dequantize\(\) first"):
        model.train()
    with torch.enable_grad(), pytest.raises(ValueError, match="in fp8 has no gradients"):
        model(clips())
    model.dequantize().train()


def test_fusing_it_is_refused_and_so_is_quantizing_a_fused_model() -> None:
    model = model_of().quantize_fp8()
    with pytest.raises(ValueError, match="fuse_for_inference: the model is in fp8"):
        model.fuse_for_inference()
    model.dequantize().fuse_for_inference()
    with pytest.raises(ValueError, match="quantize_fp8 takes a model that is not fused"):
        model.quantize_fp8()


def test_weights_that_change_afterwards_are_refused() -> None:
    model = model_of().quantize_fp8()
    model.load_state_dict(canonical(model.config, seed=1))
    with pytest.raises(ValueError, match="weights have changed since quantize_fp8"):
        model(clips())
    got = model.quantize_fp8()(clips())
    assert relative_error(got, model.dequantize()(clips())) < NEAR


def test_a_captured_graph_is_not_replayed_with_other_roundings() -> None:
    model, video = model_of(), clips()
    pack, _ = model.pack(video, masks())

    def key() -> object:
        return _key(model, video, None, pack)

    keys = [key()]
    for layers in (ALL, ("mlp",)):
        model.quantize_fp8(layers)
        keys.append(key())
        assert key() == keys[-1]
    assert len(set(keys)) == 3
    model.blocks[1].mlp.fc1.weight.add_(1)
    with pytest.raises(ValueError, match="weights have changed since quantize_fp8"):
        key()


def test_wrong_layers_and_widths_are_refused_and_leave_the_model_as_it_was() -> None:
    model = model_of(embed_dim=40, num_heads=2)
    for layers in ((), "qkv", ("fc1",)):
        with pytest.raises(ValueError, match="layers takes some of"):
            model.quantize_fp8(layers)
    with pytest.raises(ValueError, match=r"in multiples of 16, got \(120, 40\)"):
        model.quantize_fp8()
    assert model.quantized is None
    assert all(block.quantized is None for block in model.blocks)


def test_a_device_that_has_no_fp8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "refusal", lambda device: f"none on {device}")
    with pytest.raises(ValueError, match="quantize_fp8: none on cpu"):
        model_of().quantize_fp8()


def test_torch_compile_takes_it_in_one_graph() -> None:
    model = model_of().quantize_fp8(ALL)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(clips()), model(clips()))


def test_extract_in_fp8(tmp_path: Path) -> None:
    checkpoint, labelled = write_checkpoint(tmp_path / "net"), write_labelled(tmp_path)
    options = ("--checkpoint", checkpoint, "--device", "cpu", "--quiet")
    for precision in ("fp32", "fp8"):
        assert run("extract", labelled, "--out", tmp_path / precision, "--precision", precision, *options) == 0
    exact, near = (FeatureStore(tmp_path / p) for p in ("fp32", "fp8"))
    assert near.settings["precision"] == "fp8"
    assert 0 < relative_error(near.features(), exact.features()) < NEAR


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    if fault := fp8.refusal(torch.device("cuda")):
        pytest.skip(fault)
    model = model_of()
    wanted = model.quantize_fp8(ALL).encode(clips(), masks())
    model.dequantize().to("cuda", dtype).quantize_fp8(ALL)
    video, mask = clips().cuda(), masks().cuda()
    assert relative_error(model.encode(video, mask).cpu(), wanted) < NEAR
    probs = model.ensemble(video, masks=mask)
    assert torch.equal(model.ensemble(video, masks=mask), probs)  # by a captured graph
