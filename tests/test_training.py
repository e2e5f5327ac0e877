"""Whole models in training: combinations that no test of one op sees, against the same model in float64 by torch's autograd."""

import copy
from collections.abc import Callable

import plain
import pytest
import torch
from numerics import relative_error
from torch import Tensor, nn
from torch.nn import functional as F

from mmfast import MAEConfig, MaskedAutoencoder, MaskedViT, Pack, ViTConfig, pack_masks, random_masks
from mmfast.pretrain import MaskedPretraining

LANES = ["plain", pytest.param("kernel", marks=pytest.mark.interpret)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
lanes = pytest.mark.parametrize("lane", LANES)
BAR = 1e-5
SIZE = dict(img_size=8, patch_size=4, num_frames=4, embed_dim=64, depth=2, num_heads=2, mlp_ratio=2.0, num_classes=5)
DECODER = dict(decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
LABELS = torch.tensor([1, 3])


def shaken(model: nn.Module) -> nn.Module:
    """Weights of a size at which an error shows."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=draw) * 0.1)
    return model


def vit(**changes) -> MaskedViT:
    return shaken(MaskedViT(ViTConfig(**{**SIZE, **changes})))


def mae(**changes) -> MaskedAutoencoder:
    return shaken(MaskedAutoencoder(MAEConfig(**{**SIZE, **DECODER, **changes})))


def clips(seed: int = 1) -> Tensor:
    return torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def equal_mask(seed: int = 3) -> Tensor:
    return random_masks(2, 1, (2, 2, 2), 0.5, seed=seed)[:, 0]


def unequal_views() -> Pack:
    """Three views of each of two clips, that keep 4, 4, 5 and 4, 3, 4 of 8 tokens."""
    views = random_masks(2, 3, (2, 2, 2), 0.5, seed=5)
    views[0, 2, views[0, 2].nonzero()[0, 0]] = False
    views[1, 1, (~views[1, 1]).nonzero()[0, 0]] = True
    return pack_masks(views)


def gradients(model: nn.Module, value: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    value(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check(got: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    assert got.keys() == truth.keys()
    for name, grad in got.items():
        assert relative_error(grad, truth[name]) <= BAR, name


KINDS = [
    dict(qkv_bias="full", init_values=0.5, drop_path_rate=0.5, final_norm=True),
    dict(qkv_bias="none", pool="first", drop_path_rate=0.5),
    dict(pool="first", final_norm=True, fc_norm=False, gelu="quick"),
    dict(fc_norm=False, init_values=0.5),
]


@lanes
@pytest.mark.parametrize("what", [None, "block", "mlp"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_kind_of_model_on_unequal_views(kind, what, lane, monkeypatch, poisoned_empty):
    """Stochastic depth too: every second sequence is dropped, in both precisions."""
    monkeypatch.setattr(torch.Tensor, "bernoulli_", lambda t, _: t.copy_(torch.arange(t.numel()).view(t.shape) % 2))
    model, pack = vit(**kind).train(), unequal_views()
    video, wide = clips().requires_grad_(), clips().double().requires_grad_()
    truth = gradients(copy.deepcopy(model).double(), lambda m: m(wide, pack).square().sum())
    if what is not None:
        model.set_grad_checkpointing(what=what)
    check(gradients(model, lambda m: m(video, pack).square().sum()), truth)
    assert relative_error(video.grad, wide.grad) <= BAR


FROZEN: dict[str, Callable[[str], bool]] = {
    "all but the head": lambda name: not name.startswith(("head.", "fc_norm.")),
    "norm weights": lambda name: "norm" in name and name.endswith("weight"),
    "all but the biases": lambda name: not name.endswith("bias"),
    "all but the embedding": lambda name: not name.startswith("patch_embed."),
    "first block": lambda name: name.startswith(("patch_embed.", "blocks.0.")),
}


@lanes
@pytest.mark.parametrize("what", [None, "block", "mlp"])
@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_parts(frozen, what, lane, poisoned_empty):
    model, pack = vit(init_values=0.5, final_norm=True), unequal_views()
    truth = gradients(copy.deepcopy(model).double(), lambda m: m(clips().double(), pack).square().sum())
    for name, weight in model.named_parameters():
        weight.requires_grad_(not FROZEN[frozen](name))
    if what is not None:
        model.set_grad_checkpointing(what=what)
    got = gradients(model, lambda m: m(clips(), pack).square().sum())
    check(got, {name: grad for name, grad in truth.items() if not FROZEN[frozen](name)})


def _of_intermediates(model: MaskedViT, video: Tensor, mask: Tensor) -> Tensor:
    final, taken = model.forward_intermediates(video, mask)
    return final.square().sum() + sum((i + 1) * tokens.square().sum() for i, tokens in enumerate(taken))


OUTPUTS: dict[str, Callable[[MaskedViT, Tensor, Tensor], Tensor]] = {
    "encode": lambda m, video, mask: m.encode(video, mask).exp().sum(),
    "forward_features": lambda m, video, mask: m.forward_features(video, mask).exp().sum(),
    "forward_head": lambda m, video, mask: m.forward_head(m.forward_features(video, mask)).square().sum(),
    "forward_packed": lambda m, video, mask: m.forward_packed([video, video], [mask, None]).tokens.exp().sum(),
    "forward_intermediates": _of_intermediates,
}


@lanes
@pytest.mark.parametrize("norm", [False, True], ids=["no norm", "norm"])
@pytest.mark.parametrize("output", OUTPUTS)
def test_gradients_through_every_output(output, norm, lane, poisoned_empty):
    model, mask = vit(final_norm=norm), equal_mask()
    truth = gradients(copy.deepcopy(model).double(), lambda m: OUTPUTS[output](m, clips().double(), mask))
    check(gradients(model, lambda m: OUTPUTS[output](m, clips(), mask)), truth)


@lanes
def test_a_decoder_trains_behind_an_encoder_without_gradients(lane, poisoned_empty):
    model, video, mask = mae(), clips(), equal_mask()

    def loss(model: MaskedAutoencoder, video: Tensor) -> Tensor:
        visible, plan, _ = model.packs(video, mask)
        with torch.no_grad():
            tokens = model.encode(video, visible)
        pred = model.predict(tokens, plan, (2, 2, 2))
        return model.patch_loss(pred, video, plan.token_idx, plan.clip_idx)

    truth = gradients(copy.deepcopy(model).double(), lambda m: loss(m, video.double()))
    got = gradients(model, lambda m: loss(m, video))
    check(got, truth)
    assert all(name.startswith(("decoder.", "encoder_to_decoder.", "mask_token")) for name in got)


@lanes
def test_a_step_gives_the_same_bits_again(lane):
    model, video, mask = MaskedPretraining(mae()), clips(), equal_mask()
    total = model(video, clips(2), mask, LABELS)["total"]
    first = torch.autograd.grad(total, list(model.parameters()), retain_graph=True)
    for again in (total, model(video, clips(2), mask, LABELS)["total"]):
        second = torch.autograd.grad(again, list(model.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@lanes
def test_no_clips_give_zero_gradients(lane):
    model = vit(final_norm=True)
    for grad in gradients(model, lambda m: m(clips()[:0], equal_mask()[:0]).sum()).values():
        assert not grad.any()


def test_no_clips_have_no_reconstruction_loss():
    with pytest.raises(ValueError, match="no clip, or nothing removed"):
        mae().reconstruction_loss(clips()[:0], equal_mask()[:0])


# -- half precision ----------------------------------------------------------------------------------------------------


def reconstruct(config: MAEConfig, state: dict[str, Tensor], video: Tensor, mask: Tensor) -> Tensor:
    """The published loss, its targets exact: fp32 at least."""
    pred, _ = plain.autoencoder(config, state, video, mask)
    target = plain.patch_targets(config, video.double(), mask)
    wide = torch.promote_types(pred.dtype, torch.float32)
    return F.mse_loss(pred.to(wide), target.to(wide))


def classify(config: ViTConfig, state: dict[str, Tensor], video: Tensor, mask: Tensor) -> Tensor:
    logits = plain.logits(config, state, video, mask)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), LABELS.to(video.device))


def half_errors(
    model: nn.Module,
    ours: Callable[[Tensor, Tensor], Tensor],
    theirs: Callable[..., Tensor],
    dtype: torch.dtype,
    autocast: bool,
    device: str,
) -> tuple[Tensor, Tensor]:
    """Errors of ours and of plain torch, [draws, loss and gradient]."""
    errors = []
    half = torch.float32 if autocast else dtype
    for seed in range(8):
        video, mask = clips(seed).to(device), equal_mask(seed).to(device)
        state = {n: t.detach().double().requires_grad_() for n, t in model.state_dict().items()}
        rival = {n: t.detach().to(half).requires_grad_() for n, t in model.state_dict().items()}
        truth = theirs(model.config, state, video.to(half).double(), mask)
        truth.backward()
        with torch.autocast(device, dtype=dtype, enabled=autocast):
            loss, plain_loss = ours(video.to(half), mask), theirs(model.config, rival, video.to(half), mask)
        assert loss.dtype == torch.float32
        model.zero_grad()
        loss.backward()
        plain_loss.backward()
        trained = [name for name in state if state[name].grad is not None]
        grads = dict(model.named_parameters())
        assert all(grads[name].grad.dtype == half for name in trained)
        flat, plain_flat, exact = (
            torch.cat([tensors[name].grad.double().flatten() for name in trained]) for tensors in (grads, rival, state)
        )
        errors.append([relative_error(loss.detach(), truth.detach()), relative_error(flat, exact)])
        errors.append([relative_error(plain_loss.detach(), truth.detach()), relative_error(plain_flat, exact)])
    found = torch.tensor(errors).view(-1, 2, 2)
    return found[:, 0], found[:, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "cast"])
@pytest.mark.parametrize("device", DEVICES)
def test_half_precision_errs_at_most_twice_as_much_as_plain_torch(device, autocast, dtype):
    """Loss and gradient of both models. The loss is one number, which plain torch may hit by luck: root mean squares."""
    changes = dict(init_values=0.5, qkv_bias="full")
    for model, theirs in ((mae(**changes), reconstruct), (vit(**changes), classify)):
        model = model.to(device, torch.float32 if autocast else dtype)

        def ours(video: Tensor, mask: Tensor, model: nn.Module = model) -> Tensor:
            if isinstance(model, MaskedAutoencoder):
                return model.reconstruction_loss(video, mask)
            return F.cross_entropy(model(video, mask).float(), LABELS.to(device))

        mine, plains = half_errors(model, ours, theirs, dtype, autocast, device)
        got, allowed = (errors.square().mean(0).sqrt() for errors in (mine, plains))
        assert bool((got <= 2 * allowed).all()), (got, allowed)


@lanes
def test_the_residual_stream_is_fp32_under_autocast(lane):
    model, seen = mae(), []
    for block in (*model.encoder.blocks, *model.decoder.blocks):
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", dtype=torch.float16):
        model.reconstruction_loss(clips(), equal_mask()).backward()
    assert seen == [torch.float32] * 3
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


@lanes
@pytest.mark.parametrize("what", ["block", "mlp"])
def test_recomputing_under_autocast_changes_nothing(what, lane):
    model = mae()

    def loss(model: MaskedAutoencoder) -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            return model.reconstruction_loss(clips(), equal_mask())

    kept = gradients(model, loss)
    model.set_grad_checkpointing(what=what)
    got = gradients(model, loss)
    assert got.keys() == kept.keys()
    for name, grad in got.items():
        assert relative_error(grad, kept[name]) <= 1e-3, name


# -- torch.compile -----------------------------------------------------------------------------------------------------

MASKS: dict[str, Callable[[], Tensor | Pack | None]] = {
    "none": lambda: None,
    "mask": equal_mask,
    "views": lambda: random_masks(2, 3, (2, 2, 2), 0.5, seed=5),
    "pack": lambda: pack_masks(equal_mask()),
    "unequal": unequal_views,
}


def check_compiled(model: nn.Module, loss: Callable[..., Tensor], backend: str = "aot_eager") -> None:
    """In one graph, forward and backward, and equal to what it computes without."""
    want = gradients(model, loss)
    torch._dynamo.reset()
    got = gradients(model, torch.compile(loss, fullgraph=True, backend=backend))
    check(got, want)


@lanes
@pytest.mark.parametrize("kind", MASKS)
def test_a_classifier_compiles(kind, lane):
    video, mask = clips(), MASKS[kind]()
    check_compiled(vit(depth=1, final_norm=True), lambda m: m(video, mask).square().sum())


@lanes
@pytest.mark.parametrize("kind", ["mask", "views", "pack"])
def test_a_masked_autoencoder_compiles(kind, lane):
    """A mask has no counts while it is traced, and the graph none to refuse."""
    video, mask = clips(), MASKS[kind]()
    check_compiled(mae(depth=1), lambda m: m.reconstruction_loss(video, mask))
    check_compiled(mae(depth=1), lambda m: sum(out.square().mean() for out in m(video, mask)))


@lanes
@pytest.mark.parametrize("kind", ["mask", "pack"])
def test_dual_masking_compiles(kind, lane):
    video, mask, skipped = clips(), MASKS[kind](), equal_mask(9)
    check_compiled(mae(depth=1), lambda m: m.reconstruction_loss(video, mask, decode_mask=skipped))


@lanes
@pytest.mark.parametrize("kind", ["mask", "pack"])
def test_a_pretraining_step_compiles(kind, lane):
    source, target, mask = clips(), clips(2), MASKS[kind]()
    check_compiled(MaskedPretraining(mae(depth=1)), lambda m: m(source, target, mask, LABELS)["total"])


@pytest.mark.parametrize("what", ["block", "mlp"])
def test_recomputing_compiles(what):
    model, video, mask = mae(depth=1), clips(), pack_masks(equal_mask())
    model.set_grad_checkpointing(what=what)
    check_compiled(model, lambda m: m.reconstruction_loss(video, mask))


def test_inductor_compiles_a_masked_autoencoder():
    video, mask = clips(), equal_mask()
    check_compiled(mae(depth=1), lambda m: m.reconstruction_loss(video, mask), "inductor")
