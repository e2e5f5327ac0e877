"""The stage that fits EVL's decoder: what trains, how fast, what its checkpoints hold, going on, validation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("lightning")
from evl_makers import randomise
from fit_clip_makers import write_clip_model
from lightning import pytorch as pl
from stages_fakes import FakeClips, Losses, trainer

from mmfast import EVL, EVLConfig, MaskedViT
from mmfast.config import ViTConfig
from mmfast.data.video_lists import read_class_names
from mmfast.masks import sample_pack
from mmfast.optim import param_groups
from mmfast.stages.data import Clips
from mmfast.stages.fit_evl import FitEvlStage
from mmfast.stages.fit_evl_data import FitEvlData
from mmfast.stages.resume import Export, ResumePoint

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = ["red", "green", "blue, cold"]
FROZEN = "loss_module.backbone."


class Coloured(FakeClips):
    """Clips 3 x 4 x 32 x 32 whose channel that is brightest is their class."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        bright = torch.eye(3)[index % 3][:, None, None, None]
        return {**item, "rgb": 0.2 * item["rgb"] + 3 * bright - 1}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_clip_model(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vit")
    config = ViTConfig(img_size=32, patch_size=8, num_frames=4, tubelet_size=2, embed_dim=32, depth=3, num_heads=2)
    MaskedViT(config).save_pretrained(folder)
    return str(folder)


def stage(backbone: str | None, **settings: Any) -> FitEvlStage:
    torch.manual_seed(0)
    given: dict[str, Any] = dict(num_frames=4, size=32, overrides={"num_layers": 2}, lr=0.01)
    return FitEvlStage(backbone, **{"names": NAMES, **given, **settings})


def data(clips: int = 12, batch_size: int = 4, val: Any = None) -> FitEvlData:
    own = FitEvlData(Clips(path="train"), batch_size=batch_size, num_workers=0, num_frames=4, size=32)
    own.train_sets = {"train": Coloured(clips, 3)}
    if val is not None:
        own.val_dataloader = lambda: own._placed(val, len(val))  # type: ignore[method-assign]
    return own


def weights(own: FitEvlStage) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in own.state_dict().items()}


def batch(clips: int = 6) -> dict[str, Any]:
    items = [Coloured(clips, 3)[i] for i in range(clips)]
    numbers = {name: torch.tensor([item[name] for item in items]) for name in ("clip_id", "label")}
    return {**numbers, "rgb": torch.stack([item["rgb"] for item in items])}


def decoder_file(folder: Path, backbone: str, **changes: Any) -> str:
    """A decoder of random weights for 4 frames of 32 x 32, or as `changes` say."""
    given: dict[str, Any] = dict(num_layers=2, num_frames=4, num_classes=3)
    model = randomise(EVL.from_pretrained(None, backbone, **{**given, **changes}))
    model.save_decoder(folder / "start.pth")
    return str(folder / "start.pth")


# -- what trains, and how ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["clip", "vit"])
def test_decoder_and_head_move_the_backbone_does_not_and_the_loss_falls(kind: str, request: Any) -> None:
    own, losses = stage(request.getfixturevalue(kind)), Losses()
    start = weights(own)
    trainer([losses], enable_checkpointing=False, max_epochs=8).fit(own, data())
    moved = {name for name, tensor in weights(own).items() if not torch.equal(tensor, start[name])}
    # The biases of keys are alike for all keys: rounding alone moves them, or nothing does.
    assert moved | {n for n in start if n.endswith("k_proj.bias")} == {n for n in start if not n.startswith(FROZEN)}
    assert sum(losses.seen[-3:]) < 0.7 * sum(losses.seen[:3])


def test_the_loss_is_the_cross_entropy_of_the_models_logits(clip: str) -> None:
    own = stage(clip)
    own.model.eval()
    items = batch()
    wanted = F.cross_entropy(own.model(items["rgb"]), items["label"])
    torch.testing.assert_close(own.losses({"train": items})["total"], wanted)


def test_every_number_that_trains_has_a_gradient_and_an_optimiser_state(clip: str) -> None:
    """So that DDP waits for nothing."""
    own = stage(clip)
    own.losses({"train": batch()})["total"].backward()
    assert not [name for name, p in own.named_parameters() if p.requires_grad and p.grad is None]
    assert all(p.grad is None for p in own.parameters() if not p.requires_grad)
    for decay_all in (True, False):
        own.decay_all = decay_all
        listed = [p for group in own.groups(0.1) for p in group["params"]]
        assert {id(p) for p in listed} == {id(p) for p in own.parameters() if p.requires_grad}


def test_weight_decay_is_on_everything_or_on_matrices_alone(clip: str) -> None:
    own = stage(clip)
    assert [group["weight_decay"] for group in own.groups(0.1)] == [0.05]
    names = {id(p): name for name, p in own.model.named_parameters()}
    own.decay_all = False
    decays = {names[id(p)]: g["weight_decay"] for g in own.groups(0.1) for p in g["params"]}
    spared = {name for name, decay in decays.items() if decay == 0}
    assert spared >= {
        "decoder.cls_token",
        "decoder.temporal_pos_embed.0",
        "decoder.cross_attention.1.w2",
        "proj.2.bias",
    }
    assert {decays[n] for n in decays.keys() - spared} == {0.05}
    assert {n.rpartition(".")[2] for n in decays.keys() - spared} == {"weight"}
    assert "decoder.decoder_layers.0.norm1.weight" in spared
    assert "decoder.temporal_conv.0.weight" not in spared


class Rates(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_the_rate_is_as_given_and_falls_to_nothing_over_the_steps(clip: str) -> None:
    """Half a cosine over trainer.max_steps, which end in the third epoch, without warm-up."""
    rates = Rates()
    trainer([rates], enable_checkpointing=False, max_epochs=None, max_steps=8).fit(stage(clip, lr=4e-4), data())
    wanted = [4e-4 * (1 + torch.cos(torch.tensor(torch.pi * step / 8)).item()) / 2 for step in range(8)]
    assert rates.seen == pytest.approx(wanted, rel=1e-5)


def test_the_rate_grows_with_the_step_if_asked(clip: str) -> None:
    rates = Rates()
    own = trainer([rates], enable_checkpointing=False, max_epochs=None, max_steps=2, accumulate_grad_batches=2)
    own.fit(stage(clip, lr=0.256, scale_lr=True), data(batch_size=2))
    assert rates.seen[0] == pytest.approx(0.256 * 4 / 256)


def test_two_half_batches_learn_what_one_does(clip: str) -> None:
    still = {"num_layers": 2, "mlp_dropout": 0.0, "class_dropout": 0.0}
    found = []
    for size, parts in ((4, 1), (2, 2)):
        own, plain = stage(clip, overrides=still), data(batch_size=size)
        plain.train_sets = {"train": Still(12, 3)}
        settings: Any = dict(max_epochs=None, max_steps=5, accumulate_grad_batches=parts)
        trainer(enable_checkpointing=False, **settings).fit(own, plain)
        found.append(weights(own))
    for name, tensor in found[0].items():
        if not name.endswith("k_proj.bias"):  # whose gradients are rounding alone
            torch.testing.assert_close(found[1][name], tensor, atol=1e-4, rtol=1e-3, msg=name)


class Still(Coloured):
    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        return {**item, "rgb": item["rgb"].mean((1, 2, 3), keepdim=True).round().expand_as(item["rgb"])}


@pytest.mark.parametrize("kind", ["clip", "vit"])
def test_tube_masks_are_those_of_the_step(kind: str, request: Any) -> None:
    own = stage(request.getfixturevalue(kind), mask_ratio=0.5, seed=3)
    own.model.eval()
    items = batch()
    grid = (own.model.config.num_frames, 4, 4)
    pack = sample_pack(6, 1, grid, 0.5, seed=3 << 32, clip_ids=items["clip_id"])
    wanted = F.cross_entropy(own.model(items["rgb"], pack), items["label"])
    torch.testing.assert_close(own.losses({"train": items})["total"], wanted)
    assert float(wanted) != float(F.cross_entropy(own.model(items["rgb"]), items["label"]))


@pytest.mark.parametrize("kept", ["bf16", None])
def test_bf16_trains(kept: Any, clip: str) -> None:
    losses = Losses()
    own = stage(clip, backbone_dtype=kept)
    trainer([losses], enable_checkpointing=False, max_epochs=8, precision="bf16-mixed").fit(own, data())
    assert sum(losses.seen[-3:]) < 0.8 * sum(losses.seen[:3])
    assert {p.dtype for p in own.model.decoder.parameters()} == {torch.float32}
    assert {p.dtype for p in own.model.backbone.parameters()} == {torch.bfloat16 if kept else torch.float32}


# -- where it starts ---------------------------------------------------------------------------------------------------


def test_a_decoder_to_start_from_keeps_its_weights_and_gets_a_head_of_the_classes(clip: str, tmp_path: Path) -> None:
    path = decoder_file(tmp_path, clip, num_classes=7)
    own = stage(clip, decoder=path, overrides=None)
    held = torch.load(path, weights_only=True)["model"]
    found = own.model.state_dict()
    same = [n for n in held if n.startswith("module.decoder.") or n.startswith("module.proj.0.")]
    assert not [n for n in same if not torch.equal(held[n], found[n.removeprefix("module.")])]
    assert found["proj.2.weight"].shape[0] == 3


def test_a_folder_of_an_evl_brings_its_backbone(clip: str, tmp_path: Path) -> None:
    whole = randomise(EVL.from_pretrained(None, clip, num_layers=2, num_frames=4, num_classes=3))
    whole.save_pretrained(tmp_path)
    own = stage(None, decoder=str(tmp_path), overrides=None)
    wanted = whole.state_dict()
    assert not [n for n, t in own.model.state_dict().items() if not torch.equal(t, wanted[n])]


def test_a_fresh_decoder_is_of_the_clips_frames_and_grid(clip: str, vit: str) -> None:
    assert (stage(clip, num_frames=5).model.config.num_frames, stage(vit).model.config.num_frames) == (5, 2)
    own = stage(vit, size=40, num_frames=6).model
    assert (own.config.num_frames, own.config.grid) == (3, (5, 5))
    assert own.decoder.cross_attention[0].w1.shape[0] == 81  # type: ignore[index, union-attr]


def test_a_decoder_of_other_frames_is_resized_if_asked_and_refused_else(clip: str, tmp_path: Path) -> None:
    path = decoder_file(tmp_path, clip, num_frames=8)
    with pytest.raises(
        ValueError, match=r"start.pth: is a decoder of num_frames 8, the clips have 4; model.interpolate"
    ):
        stage(clip, decoder=path, overrides=None)
    own = stage(clip, decoder=path, overrides=None, interpolate=True).model
    held = torch.load(path, weights_only=True)["model"]["module.decoder.temporal_pos_embed.1"]
    wanted = (held[::2] + held[1::2]) / 2
    torch.testing.assert_close(own.decoder.temporal_pos_embed[1].detach(), wanted)  # type: ignore[index]


def test_presets_and_overrides_choose_the_decoder(clip: str) -> None:
    assert not stage(clip, preset="reference").model.decoder.cls_token.any()
    assert stage(clip, preset="paper").model.decoder.cls_token.any()
    own = stage(clip, overrides={"num_layers": 1, "temporal_cross_attention": False}).model
    assert own.decoder.cross_attention is None
    assert own.config == EVLConfig(
        own.config.backbone, num_layers=1, num_frames=4, num_classes=3, temporal_cross_attention=False
    )


# -- checkpoints -------------------------------------------------------------------------------------------------------


class KeepAll(ResumePoint):
    """Also copies every last.ckpt under the number of its step."""

    def _save(self, trainer: Any) -> None:
        super()._save(trainer)
        if self.path.exists():
            self.path.with_name(f"{trainer.global_step}.ckpt").write_bytes(self.path.read_bytes())


@pytest.mark.parametrize("parts", [1, 2], ids=["whole", "accumulated"])
def test_a_run_that_ends_within_an_epoch_goes_on_bit_for_bit_from_any_step(
    parts: int, clip: str, tmp_path: Path
) -> None:
    """5 batches an epoch and 7 steps, with dropout, masks and noise that is drawn anew; validation comes at the end too."""
    settings: Any = dict(max_epochs=None, max_steps=7, accumulate_grad_batches=parts, check_val_every_n_epoch=1)
    own = stage(clip, mask_ratio=0.25)
    whole = trainer([KeepAll(str(tmp_path), every_n_epochs=1, every_n_steps=1)], **settings)
    whole.fit(own, data(clips=10, batch_size=2, val=Coloured(9, 3)))
    wanted = weights(own)
    assert whole.global_step == 7
    points = sorted(tmp_path.glob("[0-9]*.ckpt"), key=lambda p: int(p.stem))
    assert [int(p.stem) for p in points] == list(range(1, 8))
    for point in points[:-1]:
        again = stage(clip, mask_ratio=0.25)
        run = trainer(**settings)
        run.fit(again, data(clips=10, batch_size=2, val=Coloured(9, 3)), ckpt_path=point, weights_only=True)
        found = weights(again)
        assert not [name for name in wanted if not torch.equal(found[name], wanted[name])], point.name
        assert float(run.callback_metrics["val_accuracy"]) == float(whole.callback_metrics["val_accuracy"])


def test_a_checkpoint_holds_no_backbone(clip: str, tmp_path: Path) -> None:
    own = stage(clip)
    trainer([ResumePoint(str(tmp_path))], max_epochs=1).fit(own, data())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert set(saved) == {name for name in own.state_dict() if not name.startswith(FROZEN)}
    assert any(name.startswith("loss_module.decoder.") for name in saved)


def test_a_checkpoint_on_another_backbone_is_refused(clip: str, tmp_path: Path) -> None:
    trainer([ResumePoint(str(tmp_path))], max_epochs=2).fit(stage(clip), data())
    other = stage(str(write_clip_model(tmp_path / "other", seed=1)))
    with pytest.raises(ValueError, match="one that was trained on another backbone"):
        trainer().fit(other, data(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)


def test_a_checkpoint_of_another_decoder_is_refused(clip: str, tmp_path: Path) -> None:
    trainer([ResumePoint(str(tmp_path))], max_epochs=2).fit(stage(clip), data())
    other = stage(clip, overrides={"num_layers": 1})
    with pytest.raises(ValueError, match="of another stage or model"):
        trainer().fit(other, data(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("kept", [None, "bf16"])
def test_the_model_is_exported_with_its_decoder_and_the_names_of_its_classes(
    kept: Any, clip: str, tmp_path: Path
) -> None:
    own = stage(clip, backbone_dtype=kept)
    trainer([Export(str(tmp_path / "model"))], enable_checkpointing=False).fit(own, data())
    video = torch.randn(2, 3, 4, 32, 32)
    dtype = None if kept is None else torch.bfloat16
    with torch.no_grad():
        wanted = own.model.eval()(video)
        whole = EVL.from_pretrained(tmp_path / "model", backbone_dtype=dtype)
        assert torch.equal(whole(video), wanted)
        again = EVL.from_pretrained(tmp_path / "model" / "decoder.pth", backbone=clip, backbone_dtype=dtype)
        assert torch.equal(again(video), wanted)
    assert read_class_names(tmp_path / "model" / "labels.csv") == NAMES


# -- validation --------------------------------------------------------------------------------------------------------


def test_validation_counts_first_and_first_five_and_leaves_out_what_cannot_be_read(clip: str) -> None:
    class Broken(Coloured):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {**super().__getitem__(index), **({"skipped": True} if index in (4, 5) else {})}

    own = stage(clip)
    found = trainer(max_epochs=10)
    found.fit(own, data(val=Broken(9, 3), batch_size=2))  # of one batch nothing is left
    shown = {name: float(value) for name, value in found.callback_metrics.items() if name.startswith("val_")}
    assert shown.keys() == {"val_accuracy", "val_top5"}
    kept = [i for i in range(9) if i not in (4, 5)]
    with torch.no_grad():
        scores = torch.cat([own.model.eval()(Coloured(9, 3)[i]["rgb"][None]) for i in kept])
    right = (scores.argmax(1) == torch.tensor(kept) % 3).float().mean()
    assert shown["val_accuracy"] > 60
    assert abs(shown["val_accuracy"] - 100 * float(right)) < 15  # clips have noise that is drawn anew
    assert shown["val_top5"] == 100


def test_a_run_by_steps_is_validated_at_its_end(clip: str) -> None:
    """Lightning leaves it out where max_steps ends within an epoch."""
    found = trainer(max_epochs=None, max_steps=4, check_val_every_n_epoch=1000)
    found.fit(stage(clip), data(val=Coloured(6, 3)))
    assert "val_accuracy" in found.callback_metrics
    assert found.global_step == 4


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(mask_ratio=1.0), r"mask_ratio must lie in \(0, 1\), or be 0, got 1.0"),
        (dict(preset="k400"), "unknown preset 'k400'"),
        (dict(overrides={"layers": 3}), "unknown config field 'layers'"),
        (dict(overrides={"num_layers": 3}), "num_layers must be at most 2, the backbone's blocks, got 3"),
        (dict(overrides={"num_frames": 3}), "overrides must not hold num_frames, which follows data.num_frames"),
        (dict(backbone=None), "model.backbone must be given, a CLIP or a MaskedViT"),
        (dict(warmup_epochs=-1), "warmup_epochs must be at least 0, got -1"),
    ],
    ids=["mask_ratio", "preset", "overrides", "num_layers", "num_frames", "backbone", "warmup_epochs"],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str, clip: str) -> None:
    with pytest.raises(ValueError, match=message):
        stage(**{"backbone": clip, **settings})


def test_clips_without_rgb_are_refused(clip: str) -> None:
    with pytest.raises(ValueError, match="have no rgb, which the backbone sees; they have clip_id, label"):
        stage(clip).losses({"train": {"clip_id": torch.zeros(1), "label": torch.zeros(1)}})


def test_a_schedule_without_an_end_is_refused(clip: str) -> None:
    with pytest.raises(ValueError, match=r"trainer.max_epochs or trainer.max_steps must be given"):
        trainer(max_epochs=-1, max_steps=-1).fit(stage(clip), data())


def test_param_groups_spares_places_by_the_decoders_word(clip: str) -> None:
    model = stage(clip).model
    spared = {id(p) for g in param_groups(model.decoder) if not g["weight_decay"] for p in g["params"]}
    assert all(id(p) in spared for p in model.decoder.temporal_pos_embed)  # type: ignore[union-attr]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("mask_ratio", [0.0, 0.5])
def test_a_gpu_trains_and_validates(mask_ratio: float, precision: str, clip: str) -> None:
    kept: Any = {"bf16-mixed": "bf16", "16-mixed": "fp16"}.get(precision)
    own, losses = stage(clip, mask_ratio=mask_ratio, backbone_dtype=kept), Losses()
    found = trainer([losses], enable_checkpointing=False, max_epochs=12, precision=precision, accelerator="gpu")
    found.fit(own, data(val=Coloured(9, 3)))
    assert sum(losses.seen[-3:]) < 0.9 * sum(losses.seen[:3])
    assert float(found.callback_metrics["val_accuracy"]) > 60
    assert own.skipped == 0
