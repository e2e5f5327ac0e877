"""Stage I's losses: one packed batch, the same as its parts computed apart."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmfast.config import MAEConfig
from mmfast.mae import MaskedAutoencoder
from mmfast.masks import tube_masks
from mmfast.pretrain import MaskedPretraining

LABELS = torch.tensor([2, 0, 4])


def model_of(**overrides) -> MaskedAutoencoder:
    torch.manual_seed(0)
    tiny = dict(img_size=32, embed_dim=64, depth=2, num_heads=2, num_frames=4, num_classes=5)
    decoder = dict(decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=1)
    return MaskedAutoencoder(MAEConfig.from_dict({**tiny, **decoder, **overrides}))


def clips(batch: int = 3, seed: int = 1, **size) -> Tensor:
    shape = (batch, 3, size.get("frames", 4), 32, 32)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def masks(batch: int = 3) -> Tensor:
    return tube_masks(batch, 1, (2, 2, 2), 0.5, seed=4)[:, 0]


@pytest.mark.parametrize(("target_weight", "ce_weight"), [(1.0, 0.05), (0.5, 2.0)])
def test_total_and_gradients_are_those_of_the_parts(target_weight: float, ce_weight: float) -> None:
    model, source, target, mask = model_of(), clips(), clips(seed=2), masks()
    step = MaskedPretraining(model, target_weight, ce_weight)
    parts = step(source, target, mask, LABELS)
    together = torch.autograd.grad(parts["total"], list(model.parameters()))

    logits = model(source, mask).logits
    assert logits is not None
    ce = F.cross_entropy(logits, LABELS)
    recon = model.reconstruction_loss(source, mask), model.reconstruction_loss(target, mask)
    total = recon[0] + target_weight * recon[1] + ce_weight * ce
    apart = torch.autograd.grad(total, list(model.parameters()))

    for name, got, want in [
        ("total", parts["total"], total),
        ("source_loss", parts["source_loss"], recon[0]),
        ("target_loss", parts["target_loss"], recon[1]),
        ("ce", parts["ce"], ce),
        *((n, g, w) for (n, _), g, w in zip(model.named_parameters(), together, apart, strict=True)),
    ]:
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_the_released_loss_does_not_look_at_target_clips() -> None:
    model, source, mask = model_of(), clips(), masks()
    rows = []
    model.encoder.blocks[0].register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[0]))
    losses = MaskedPretraining(model, target_weight=0.0)(source, None, mask, LABELS)
    assert rows == [int((~mask).sum())]
    assert "target_loss" not in losses
    torch.testing.assert_close(losses["total"], losses["source_loss"] + 0.05 * losses["ce"])


def test_another_mask_for_the_target() -> None:
    model, source, target = model_of(num_classes=0), clips(), clips(batch=2, seed=2)
    own = tube_masks(2, 1, (2, 2, 2), 0.75, seed=9)[:, 0]
    losses = MaskedPretraining(model)(source, target, masks(), target_mask=own)
    torch.testing.assert_close(losses["source_loss"], model.reconstruction_loss(source, masks()))
    torch.testing.assert_close(losses["target_loss"], model.reconstruction_loss(target, own))
    assert set(losses) == {"total", "source_loss", "target_loss"}


def test_raw_pixels_when_asked_for() -> None:
    model, source, mask = model_of(num_classes=0), clips(), masks()
    losses = MaskedPretraining(model, 0.0, normalize_target=False)(source, None, mask)
    torch.testing.assert_close(losses["total"], model.reconstruction_loss(source, mask, normalize_target=False))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(target=None), ValueError, "target must be given: target_weight is above 0"),
        (dict(target=clips(frames=8)), ValueError, "mask must be"),
        (
            dict(target=clips(frames=8), target_mask=tube_masks(3, 1, (4, 2, 2), 0.5)[:, 0]),
            ValueError,
            r"target must have the source's token grid \(2, 2, 2\), got \(4, 2, 2\)",
        ),
        (dict(labels=None), ValueError, "labels must be given"),
        (dict(labels=LABELS[:2]), ValueError, r"labels must be \[3\], one class a source clip, got \(2,\)"),
        (dict(labels=LABELS + 1), ValueError, r"labels must lie in 0\.\.4, got 1\.\.5"),
        (dict(labels=LABELS.float()), TypeError, "labels must be int64, got torch.float32"),
        (dict(mask=torch.zeros(3, 8, dtype=torch.bool)), ValueError, "mask must remove at least one token"),
        (dict(mask=torch.eye(3, 8).bool() | (torch.arange(8) < 2)), ValueError, "mask must remove equally many tokens"),
    ],
)
def test_bad_input_is_named(change: dict, error: type[Exception], message: str) -> None:
    given = dict(source=clips(), target=clips(seed=2), mask=masks(), labels=LABELS) | change
    with pytest.raises(error, match=message):
        MaskedPretraining(model_of())(**given)


def test_weights_are_checked() -> None:
    with pytest.raises(ValueError, match="ce_weight must be finite and at least 0, got nan"):
        MaskedPretraining(model_of(), ce_weight=float("nan"))
