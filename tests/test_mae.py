"""MaskedAutoencoder against the published pre-training model, restated and Hugging Face's: predictions, losses, gradients."""

import os

import plain
import pytest
import torch
from makers import hf_videomae
from numerics import relative_error
from torch import Tensor
from torch.nn import functional as F

from mmfast import Pack, pack_masks, random_masks, tube_masks
from mmfast.config import MAEConfig
from mmfast.mae import MaskedAutoencoder

os.environ.setdefault("HF_HUB_OFFLINE", "1")
GEOMETRY = {"rgb": (3, 16, 48), "flow": (2, 16, 48), "pose": (21, 4, 12)}
BAR = 1e-5


def build(modality: str = "rgb", **changes) -> MaskedAutoencoder:
    """Two encoder and two decoder blocks over 2 x 3 x 3 tokens, weights of a size at which an error shows."""
    channels, patch, size = GEOMETRY[modality]
    fields = dict(in_chans=channels, patch_size=patch, img_size=size, num_frames=4, embed_dim=64, depth=2, num_heads=2)
    fields |= dict(decoder_embed_dim=48, decoder_depth=2, decoder_num_heads=3, num_classes=5)
    model = MaskedAutoencoder(MAEConfig(**{**fields, **changes}))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=draw) * 0.1)
    return model


def clips(model: MaskedAutoencoder, count: int = 2, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    config = model.config
    shape = (count, config.in_chans, config.num_frames, *config.frame_size)
    draw = torch.Generator().manual_seed(seed)
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, generator=draw, dtype=dtype)
    return torch.randn(shape, generator=draw)


def masks(model: MaskedAutoencoder, count: int = 2, seed: int = 3) -> Tensor:
    return random_masks(count, 1, model.config.grid, 0.6, seed=seed)[:, 0]


def floats(model: MaskedAutoencoder, video: Tensor) -> Tensor:
    """The normalised float64 video that a uint8 or float one stands for."""
    if video.dtype != torch.uint8:
        return video.double()
    mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1, 1) for v in (model.config.mean, model.config.std))
    return (video.double() / 255 - mean) / std


def exact_state(model: MaskedAutoencoder, grad: bool = False) -> dict[str, Tensor]:
    return {name: t.detach().double().requires_grad_(grad) for name, t in model.state_dict().items()}


def published_loss(model, state, video, mask, normalize: bool = True) -> Tensor:
    pred, _ = plain.autoencoder(model.config, state, floats(model, video), mask)
    return F.mse_loss(pred, plain.patch_targets(model.config, floats(model, video), mask, normalize))


def gradient_errors(model: MaskedAutoencoder, state: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of every parameter's gradient; those that neither side has are left out."""
    errors = {}
    for name, weight in model.named_parameters():
        assert (weight.grad is None) == (state[name].grad is None), name
        if weight.grad is not None:
            errors[name] = relative_error(weight.grad, state[name].grad)
    return errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=["float", "uint8"])
@pytest.mark.parametrize("modality", GEOMETRY)
def test_predictions_and_logits_are_the_published_ones(modality, dtype):
    model = build(modality)
    video, mask = clips(model, dtype=dtype), masks(model)
    pred, logits = plain.autoencoder(model.config, exact_state(model), floats(model, video), mask)
    with torch.no_grad():
        out = model(video, mask)
    assert relative_error(out.pred, pred) <= BAR
    assert relative_error(out.logits, logits) <= BAR


@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "raw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=["float", "uint8"])
@pytest.mark.parametrize("modality", GEOMETRY)
def test_loss_and_gradients_are_the_published_ones(modality, dtype, normalize):
    model = build(modality)
    video, mask, state = clips(model, dtype=dtype), masks(model), exact_state(model, grad=True)
    expected = published_loss(model, state, video, mask, normalize)
    expected.backward()
    loss = model.reconstruction_loss(video, mask, normalize)
    loss.backward()
    assert loss.dtype == torch.float32
    assert relative_error(loss.detach(), expected.detach()) <= BAR
    errors = gradient_errors(model, state)
    assert len(errors) == len(state) - 4  # the class branch has no part in it
    assert max(errors.values()) <= BAR, errors


def test_gradients_of_the_class_branch_are_the_published_ones():
    model = build()
    video, mask, state = clips(model), masks(model), exact_state(model, grad=True)
    labels = torch.tensor([3, 0])
    F.cross_entropy(plain.autoencoder(model.config, state, video.double(), mask)[1], labels).backward()
    F.cross_entropy(model(video, mask).logits, labels).backward()
    for name, weight in model.named_parameters():
        if name.startswith(("encoder.", "fc_norm.", "head.")):
            assert relative_error(weight.grad, state[name].grad) <= BAR, name


@pytest.mark.parametrize("changes", [dict(qkv_bias="full"), dict(init_values=0.5), dict(fc_norm=False)], ids=str)
def test_other_models_of_the_family(changes):
    model = build(**changes)
    video, mask = clips(model), masks(model)
    pred, logits = plain.autoencoder(model.config, exact_state(model), video.double(), mask)
    with torch.no_grad():
        out = model(video, mask)
    assert relative_error(out.pred, pred) <= BAR
    assert relative_error(out.logits, logits) <= BAR


def test_dual_masking_decodes_only_what_it_is_told_to():
    """VideoMAE v2: the removed tokens outside the decoder's choice are neither seen nor predicted."""
    model = build()
    video, mask = clips(model), masks(model)
    chosen = torch.zeros_like(mask)
    for row, removed in zip(chosen, mask, strict=True):
        row[removed.nonzero()[:4, 0]] = True
    decode_mask = ~chosen
    pred, _ = plain.autoencoder(model.config, exact_state(model), video.double(), mask, decode_mask)
    with torch.no_grad():
        assert relative_error(model(video, mask, decode_mask).pred, pred) <= BAR
    target = plain.patch_targets(model.config, video.double(), mask & chosen)
    with torch.no_grad():
        loss = model.reconstruction_loss(video, mask, decode_mask=decode_mask)
    assert relative_error(loss, F.mse_loss(pred, target)) <= BAR


def test_views_of_one_clip_are_as_clips_of_their_own():
    model = build()
    video, views = clips(model), tube_masks(2, 3, model.config.grid, 0.6)
    with torch.no_grad():
        out = model(video, views)
        alone = model(video.repeat_interleave(3, 0), views.flatten(0, 1))
    assert relative_error(out.pred.flatten(0, 1), alone.pred) <= BAR
    assert relative_error(out.logits.flatten(0, 1), alone.logits) <= BAR


def test_a_pack_is_as_its_mask():
    model = build()
    video, mask = clips(model), masks(model)
    with torch.no_grad():
        assert torch.equal(model(video, pack_masks(mask)).pred, model(video, mask).pred)


def test_one_pack_of_two_batches_is_as_two_passes():
    model = build()
    mask = masks(model)
    source, target = clips(model, seed=1), clips(model, seed=2)
    both = model.reconstruction_loss(torch.cat((source, target)), torch.cat((mask, mask)))
    both.backward()
    packed = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()
    apart = (model.reconstruction_loss(source, mask) + model.reconstruction_loss(target, mask)) / 2
    apart.backward()
    assert relative_error(both.detach(), apart.detach()) <= BAR
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            assert relative_error(packed[name], weight.grad) <= BAR, name


def test_recomputing_gives_the_same_gradients():
    model = build()
    video, mask = clips(model), masks(model)
    model.reconstruction_loss(video, mask).backward()
    kept = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing()
    model.reconstruction_loss(video, mask).backward()
    for name, weight in model.named_parameters():
        assert (weight.grad is None) == (kept[name] is None)
        assert weight.grad is None or torch.equal(weight.grad, kept[name]), name


def test_unequal_views_train_through_dual_masking():
    """Views that keep different numbers of tokens have a loss where the decoder's choice is given: a mean over patches."""
    model = build()
    video, mask = clips(model), masks(model)
    mask[1, mask[1].nonzero()[0, 0]] = False
    state, total, count = exact_state(model), 0.0, 0
    for i in range(2):
        pred, _ = plain.autoencoder(model.config, state, video[i : i + 1].double(), mask[i : i + 1])
        target = plain.patch_targets(model.config, video[i : i + 1].double(), mask[i : i + 1])
        total, count = total + (pred - target).square().sum(), count + pred.numel()
    with torch.no_grad():
        loss = model.reconstruction_loss(video, mask, decode_mask=torch.zeros_like(mask))
    assert relative_error(loss, total / count) <= BAR


def test_unequal_views_are_refused():
    model = build()
    video, mask = clips(model), masks(model)
    mask[1, mask[1].nonzero()[0, 0]] = False
    with pytest.raises(ValueError, match="equally many"):
        model(video, mask)
    with pytest.raises(ValueError, match="equally many"):
        model.reconstruction_loss(video, mask)


def test_a_mask_that_removes_nothing_is_refused():
    model = build()
    with pytest.raises(ValueError, match="removes none"):
        model(clips(model), torch.zeros(2, model.config.num_tokens, dtype=torch.bool))


def test_no_mask_is_refused():
    model = build()
    with pytest.raises(ValueError, match="mask must be given"):
        model(clips(model), None)


def test_wrong_decode_masks_are_refused():
    model = build()
    video, mask = clips(model), masks(model)
    with pytest.raises(TypeError, match="decode_mask must be a bool tensor"):
        model(video, mask, mask.float())
    with pytest.raises(ValueError, match="decode_mask must be"):
        model(video, mask, mask[:, :5])
    with pytest.raises(ValueError, match="decode_mask must have the mask's shape"):
        model(video, mask, mask[:, None].expand(-1, 2, -1))
    pack: Pack = pack_masks(tube_masks(2, 2, model.config.grid, 0.6))
    with pytest.raises(ValueError, match="one row a view, 4, got 2"):
        model(video, pack, mask)


def test_classifying_without_classes_is_refused():
    model = build(num_classes=0)
    video, mask = clips(model), masks(model)
    visible, _, _ = model.packs(video, mask)
    with torch.no_grad():
        assert model(video, mask).logits is None
        tokens = model.encode(video, visible)
    with pytest.raises(ValueError, match="no class branch"):
        model.classify(tokens, visible)


# -- Hugging Face ------------------------------------------------------------------------------------------------------


def hugging_face(model: MaskedAutoencoder):
    """VideoMAEForPreTraining with the weights of `model`, which has no class branch."""
    transformers = pytest.importorskip("transformers")
    own = model.config
    theirs = transformers.VideoMAEForPreTraining(
        transformers.VideoMAEConfig(
            image_size=own.img_size,
            patch_size=own.patch_size,
            num_channels=own.in_chans,
            num_frames=own.num_frames,
            tubelet_size=own.tubelet_size,
            hidden_size=own.embed_dim,
            num_hidden_layers=own.depth,
            num_attention_heads=own.num_heads,
            intermediate_size=own.mlp_dim,
            layer_norm_eps=own.norm_eps,
            decoder_hidden_size=own.decoder_embed_dim,
            decoder_num_hidden_layers=own.decoder_depth,
            decoder_num_attention_heads=own.decoder_num_heads,
            decoder_intermediate_size=own.decoder.mlp_dim,
            norm_pix_loss=own.normalize_target,
            use_mean_pooling=False,
        )
    )
    theirs.decoder.norm.eps = own.norm_eps  # fixed at torch's default there
    state = model.state_dict()
    renamed = hf_videomae(plain.part(state, "encoder."), "5.17")
    for name, tensor in hf_videomae(plain.part(state, "decoder."), "5.17", root="decoder.").items():
        name = name.replace("decoder.encoder.layer.", "decoder.decoder_layers.").replace(
            "decoder.layernorm.", "decoder.norm."
        )
        renamed[name.replace("classifier.", "decoder.head.")] = tensor
    renamed |= {name: state[name] for name in ("encoder_to_decoder.weight", "mask_token")}
    theirs.load_state_dict(renamed)
    return theirs.eval()


@pytest.mark.parametrize(("modality", "normalize"), [("rgb", True), ("rgb", False), ("flow", True), ("pose", True)])
def test_hugging_face_has_the_same_predictions_and_loss(modality, normalize):
    # Equal targets for flow and pose too, which transformers does not un-normalise: a patch's own statistics undo that.
    model = build(modality, num_classes=0, normalize_target=normalize)
    video, mask = clips(model), masks(model)
    theirs = hugging_face(model)(video.transpose(1, 2), bool_masked_pos=mask)
    with torch.no_grad():
        assert relative_error(model(video, mask).pred, theirs.logits) <= BAR
        assert relative_error(model.reconstruction_loss(video, mask), theirs.loss) <= BAR


def test_hugging_face_has_the_same_gradients():
    model = build(num_classes=0)
    video, mask = clips(model), masks(model)
    theirs = hugging_face(model)
    theirs(video.transpose(1, 2), bool_masked_pos=mask).loss.backward()
    model.reconstruction_loss(video, mask).backward()
    for ours, other in (
        (model.encoder.patch_embed.proj, theirs.videomae.embeddings.patch_embeddings.projection),
        (model.encoder_to_decoder, theirs.encoder_to_decoder),
        (model.decoder.blocks[0].mlp.fc1, theirs.decoder.decoder_layers[0].intermediate.dense),
        (model.decoder.head, theirs.decoder.head),
    ):
        assert relative_error(ours.weight.grad, other.weight.grad) <= BAR
    assert relative_error(model.mask_token.grad, theirs.mask_token.grad) <= BAR
