"""The whole model through the Triton kernels, on the CPU: they compose, and nothing between them is lost."""

import pytest
import torch
from numerics import relative_error
from plain import autoencoder, patch_targets
from plain import logits as plain_logits

from mmfast import MAEConfig, MaskedAutoencoder, MaskedViT, ViTConfig, tube_masks
from mmfast.pretrain import MaskedPretraining

pytestmark = pytest.mark.interpret


def tiny(**changes) -> MaskedViT:
    torch.manual_seed(0)
    config = dict(
        img_size=32, patch_size=16, num_frames=4, embed_dim=64, depth=2, num_heads=2, num_classes=5, mlp_ratio=2.0
    )
    model = MaskedViT(ViTConfig(**{**config, **changes})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


@pytest.mark.parametrize("changes", [dict(), dict(final_norm=True, norm_eps=1e-5), dict(pool="first", final_norm=True)])
def test_ensemble_equals_the_published_model(changes: dict, poisoned_empty) -> None:
    model = tiny(**changes)
    raw = torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8).permute(0, 4, 1, 2, 3)
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (model.config.mean, model.config.std))
    masks = tube_masks(2, 2, model.config.grid, 0.5, seed=1)
    views = [plain_logits(model.config, model.state_dict(), (raw / 255 - mean) / std, masks[:, v]) for v in range(2)]
    expected = torch.stack(views).softmax(-1).mean(0)
    assert relative_error(model.ensemble(raw, 2, 0.5, seed=1), expected) <= 1e-5


def test_unequal_views(poisoned_empty) -> None:
    model = tiny()
    video = torch.randn(1, 3, 4, 32, 32)
    masks = torch.stack([tube_masks(1, 1, model.config.grid, r)[:, 0] for r in (0.25, 0.75)], 1)
    with torch.no_grad():
        got = model(video, masks)
        for view in range(2):
            expected = plain_logits(model.config, model.state_dict(), video, masks[:, view])
            assert relative_error(got[:, view], expected) <= 1e-5


def test_half_precision_errs_at_most_twice_as_much_as_plain_torch(poisoned_empty) -> None:
    model = tiny()
    video = torch.randn(1, 3, 4, 32, 32)
    state = model.state_dict()
    with torch.no_grad():
        truth = plain_logits(model.config, {k: v.double() for k, v in state.items()}, video.double())
        plain = plain_logits(model.config, {k: v.half() for k, v in state.items()}, video.half())
        got = model.half()(video.half())
    assert relative_error(got, truth) <= 2 * relative_error(plain, truth)


def test_a_training_step_has_the_gradients_of_the_published_model(poisoned_empty) -> None:
    torch.manual_seed(0)
    decoder = dict(decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=1)
    config = MAEConfig(
        img_size=32, num_frames=4, embed_dim=64, depth=2, num_heads=2, num_classes=5, mlp_ratio=2.0, **decoder
    )
    model = MaskedAutoencoder(config)
    raw = torch.randint(0, 256, (2, 3, 4, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (config.mean, config.std))
    video, mask = (raw / 255 - mean) / std, tube_masks(2, 1, config.grid, 0.5, seed=1)[:, 0]
    labels = torch.tensor([1, 3])
    got = torch.autograd.grad(
        MaskedPretraining(model, 0.0, 1.0)(raw, None, mask, labels)["total"], list(model.parameters())
    )

    state = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    pred, logits = autoencoder(config, state, video.double(), mask)
    targets = patch_targets(config, video.double(), mask, True)
    loss = (pred - targets).square().mean() + torch.nn.functional.cross_entropy(logits, labels)
    for name, mine, truth in zip(state, got, torch.autograd.grad(loss, list(state.values())), strict=True):
        assert relative_error(mine, truth) <= 2e-5, name
