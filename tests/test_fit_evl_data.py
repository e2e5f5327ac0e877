"""Where fit-evl's batches come from: videos, or features on the disk; and the command from a list of videos to a model."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

pytest.importorskip("lightning")
from fit_clip_makers import COLOURS, flags, write_clip_model, write_labels, write_videos
from stages_fakes import Losses, trainer

from mmfast import EVL
from mmfast.cli import main
from mmfast.clip_vision import CLIPVision
from mmfast.data.dataset import ClipDataset
from mmfast.data.video_lists import read_class_names
from mmfast.evl_cache import CachedClips
from mmfast.stages.data import Clips
from mmfast.stages.fit_evl import FitEvlStage
from mmfast.stages.fit_evl_data import FitEvlData
from mmfast.stages.resume import ResumePoint

pytestmark = pytest.mark.filterwarnings("ignore")
STILL = {"num_layers": 2, "mlp_dropout": 0.0, "class_dropout": 0.0}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_clip_model(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 12 videos of 3 classes and a list of them."""
    folder = tmp_path_factory.mktemp("videos")
    write_videos(folder)
    write_labels(folder / "labels.csv")
    return folder


def stage(clip: str, **settings: Any) -> FitEvlStage:
    torch.manual_seed(0)
    given: dict[str, Any] = dict(names=list(COLOURS), num_frames=3, size=32, overrides=STILL, lr=0.01)
    return FitEvlStage(clip, **{**given, **settings})


def listed(folder: Path) -> Clips:
    return Clips("list", str(folder / "list.txt"), str(folder))


def fixed(folder: Path, **settings: Any) -> FitEvlData:
    """Clips that do not change."""
    given: dict[str, Any] = dict(batch_size=4, num_workers=0, num_frames=3, size=32, stride=2)
    return FitEvlData(listed(folder), listed(folder), augment=False, position="centre", **{**given, **settings})


def cached(folder: Path, cache: Path, **settings: Any) -> FitEvlData:
    return fixed(folder, **{"cache": str(cache), "cache_dtype": "float32", **settings})


def weights(own: FitEvlStage) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in own.state_dict().items()}


@pytest.fixture
def no_backbone(monkeypatch: Any) -> None:
    """Whoever decodes a video or runs the backbone fails."""

    def never(*_: Any, **__: Any) -> Iterator[Any]:
        raise AssertionError("the backbone must not run, and no video be read")

    monkeypatch.setattr(CLIPVision, "stream", never)
    monkeypatch.setattr(ClipDataset, "__getitem__", never)


# -- videos ------------------------------------------------------------------------------------------------------------


def batches(own: FitEvlData, epoch: int) -> list[Tensor]:
    loader = own.train_dataloader()
    loader.sampler.set_epoch(epoch)
    found = [batch["train"] for batch in loader]
    clips = {int(i): clip for batch in found for i, clip in zip(batch["clip_id"], batch["rgb"], strict=True)}
    return [clips[i] for i in sorted(clips)]


def changed(own: FitEvlData) -> int:
    """How many clips another pass shows differently."""
    own.setup()
    return sum(not torch.equal(a, b) for a, b in zip(batches(own, 0), batches(own, 1), strict=True))


def test_clips_are_drawn_anew_in_every_pass_unless_fixed(videos: Path) -> None:
    given: dict[str, Any] = dict(batch_size=4, num_workers=0, num_frames=3, size=32, stride=1)
    assert changed(FitEvlData(listed(videos), **given)) == 12
    assert changed(fixed(videos)) == 0
    assert changed(FitEvlData(listed(videos), augment=False, **given)) > 3  # the place in time is drawn
    assert changed(FitEvlData(listed(videos), augment=False, sampling="uniform", **given)) > 3


@pytest.mark.parametrize("settings", [dict(flip=0.0, scale=(1.0, 1.0)), dict(flip=1.0)], ids=str)
def test_mirror_images_are_honoured(settings: dict[str, Any], tmp_path: Path) -> None:
    """EVL's flag for them was stored and never looked at."""
    import numpy as np
    from video_files import write_clip

    pixels = np.zeros((4, 32, 32, 3), np.uint8)
    pixels[:, :, :16] = 200
    write_clip(tmp_path / "a.mp4", pixels)
    (tmp_path / "list.txt").write_text("a.mp4 0\n")
    given: dict[str, Any] = dict(batch_size=1, num_workers=0, num_frames=2, size=32, stride=1, randaugment=None)
    own = FitEvlData(listed(tmp_path), **{**given, "scale": (1.0, 1.0), **settings})
    own.setup()
    seen = batches(own, 0)[0].float().mean((0, 1, 2))
    assert (float(seen[:12].mean()) > 150) == (settings["flip"] == 0)
    assert (float(seen[20:].mean()) > 150) == (settings["flip"] == 1)


def test_randaugment_reaches_the_batches(videos: Path) -> None:
    given: dict[str, Any] = dict(batch_size=4, num_workers=0, num_frames=3, size=32, stride=1)
    found = []
    for policy in (None, "rand-m9-n8-p1-inc1"):
        own = FitEvlData(listed(videos), randaugment=policy, **given)
        own.setup()
        found.append(batches(own, 0))
    assert sum(not torch.equal(a, b) for a, b in zip(*found, strict=True)) >= 11


def test_classes_of_a_list_go_by_number_without_a_table(videos: Path) -> None:
    assert fixed(videos).names == ["0", "1", "2"]
    assert fixed(videos, labels=str(videos / "labels.csv")).names == list(COLOURS)


# -- features on the disk ----------------------------------------------------------------------------------------------


def test_training_on_features_learns_what_training_on_their_videos_does(
    clip: str, videos: Path, tmp_path: Path
) -> None:
    own, other, losses = stage(clip), stage(clip), (Losses(), Losses())
    runs = [trainer([seen], enable_checkpointing=False, max_epochs=4) for seen in losses]
    runs[0].fit(own, fixed(videos))
    runs[1].fit(other, cached(videos, tmp_path / "cache"))
    assert losses[1].seen == pytest.approx(losses[0].seen, rel=1e-3)
    for name, tensor in weights(own).items():
        if not name.endswith("k_proj.bias"):  # whose gradients are rounding alone
            torch.testing.assert_close(weights(other)[name], tensor, atol=1e-3, rtol=1e-2, msg=name)
    shown = [{n: float(v) for n, v in run.callback_metrics.items() if n.startswith("val_")} for run in runs]
    assert shown[0] == shown[1]
    assert shown[1]["val_accuracy"] > 80


def test_a_second_run_neither_reads_videos_nor_runs_the_backbone(
    clip: str, videos: Path, tmp_path: Path, request: Any
) -> None:
    first = stage(clip)
    trainer(max_epochs=2).fit(first, cached(videos, tmp_path))
    request.getfixturevalue("no_backbone")
    again = stage(clip)
    trainer(max_epochs=2).fit(again, cached(videos, tmp_path))
    assert not [n for n, t in weights(first).items() if not torch.equal(weights(again)[n], t)]


def test_workers_read_the_same_features(clip: str, videos: Path, tmp_path: Path) -> None:
    found = []
    for workers in (0, 2):
        own = stage(clip)
        trainer(max_epochs=1).fit(own, cached(videos, tmp_path, num_workers=workers))
        found.append(weights(own))
    assert not [name for name, tensor in found[0].items() if not torch.equal(found[1][name], tensor)]


def test_a_run_on_features_goes_on_bit_for_bit(clip: str, videos: Path, tmp_path: Path) -> None:
    settings: Any = dict(max_epochs=None, max_steps=8)
    dropped = {"num_layers": 2}
    own = stage(clip, overrides=dropped)
    trainer(**settings).fit(own, cached(videos, tmp_path / "cache"))
    cut = stage(clip, overrides=dropped)
    stop = trainer([ResumePoint(str(tmp_path), every_n_steps=1)], **settings)
    stop.limit_val_batches = 0

    class Killed(Losses):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 4:
                raise RuntimeError("killed")

    stop.callbacks.insert(0, Killed())
    with pytest.raises(RuntimeError, match="killed"):
        stop.fit(cut, cached(videos, tmp_path / "cache"))
    again = stage(clip, overrides=dropped)
    going = trainer(**settings)
    going.fit(again, cached(videos, tmp_path / "cache"), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert not [n for n, t in weights(own).items() if not torch.equal(weights(again)[n], t)]


def test_features_are_of_the_masks_of_seed_and_clip_and_validation_is_of_whole_clips(
    clip: str, videos: Path, tmp_path: Path
) -> None:
    data = cached(videos, tmp_path)
    trainer(max_epochs=1).fit(stage(clip, mask_ratio=0.5, seed=3), data)
    train, val = data.train_sets["train"], data._val_set
    assert isinstance(train, CachedClips)
    assert (train.cache.settings["mask_ratio"], train.cache.settings["mask_seed"]) == (0.5, 3)
    assert len(train[0]["features"][0].cells) == 8
    assert val[0]["features"][0].cells is None


def test_a_cache_of_other_weights_or_clips_is_refused(clip: str, videos: Path, tmp_path: Path) -> None:
    trainer(max_epochs=1).fit(stage(clip), cached(videos, tmp_path / "cache"))
    other = stage(str(write_clip_model(tmp_path / "other", seed=1)))
    with pytest.raises(ValueError, match="run with other settings: weights"):
        trainer().fit(other, cached(videos, tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"other settings: about.stride \(2 there, 1 now\)"):
        trainer().fit(stage(clip), cached(videos, tmp_path / "cache", stride=1))
    with pytest.raises(ValueError, match=r"precision \(\"fp32\" there, \"bf16\" now\)"):
        trainer(precision="bf16-mixed").fit(stage(clip), cached(videos, tmp_path / "cache"))


def test_a_damaged_shard_is_made_anew(clip: str, videos: Path, tmp_path: Path) -> None:
    first = stage(clip)
    trainer(max_epochs=1).fit(first, cached(videos, tmp_path))
    shard = next((tmp_path / "train").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    again = stage(clip)
    trainer(max_epochs=1).fit(again, cached(videos, tmp_path))
    assert not [n for n, t in weights(first).items() if not torch.equal(weights(again)[n], t)]


def test_clips_that_cannot_be_read_are_left_out(clip: str, videos: Path, tmp_path: Path) -> None:
    own = tmp_path / "videos"
    shutil.copytree(videos, own)
    (own / "clip 1 2.mp4").write_bytes(b"no video")
    data = cached(own, tmp_path / "cache")
    with pytest.warns(UserWarning, match="1 of 12 train clips could not be read and are left out"):
        trainer(max_epochs=1).fit(stage(clip), data)
    train = data.train_sets["train"]
    assert 6 not in train.ids
    assert train.labels == [0] * 4 + [1] * 3 + [2] * 4


def test_too_large_a_cache_is_refused_before_anything_is_written(clip: str, videos: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="and max_gib is 1e-05"):
        trainer().fit(stage(clip), cached(videos, tmp_path / "cache", cache_gib=1e-5))
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(augment=True), "data.augment must be false with data.cache, whose clips do not change; got true"),
        (
            dict(position="random"),
            "data.position must be centre with data.cache, whose clips do not change; got random",
        ),
        (dict(cache=None, cache_gib=3.0), "data.cache_gib is of data.cache, a folder, which is not given; got 3"),
    ],
    ids=["augment", "position", "cache_gib"],
)
def test_what_a_cache_cannot_have_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = dict(cache="somewhere", augment=False, position="centre")
    with pytest.raises(ValueError, match=message):
        FitEvlData(Clips(path="train"), **{**given, **settings})


def test_features_without_a_trainer_are_refused(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data.cache needs a Trainer"):
        cached(videos, tmp_path).setup()


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["paper", "paper_16f", "paper_32f", "reference"])
def test_presets_are_the_published_settings(preset: str, capsys: Any) -> None:
    given = ["--preset", preset, "--model.backbone", "c", "--data.train.path", "t", "--print_config"]
    with pytest.raises(SystemExit) as stop:
        main(["fit-evl", *given])
    assert stop.value.code == 0
    found = yaml.safe_load(capsys.readouterr().out)
    model, own, run = found["model"], found["data"], found["trainer"]
    wanted = dict(
        lr=4e-4, min_lr=0.0, warmup_epochs=0, weight_decay=0.05, decay_all=True, scale_lr=False, mask_ratio=0.0
    )
    assert {name: model[name] for name in wanted} == wanted
    reference = preset == "reference"
    assert (run["max_steps"], run["max_epochs"]) == (50_000, None)
    assert own["batch_size"] * run["accumulate_grad_batches"] == 256
    frames = {"paper_16f": (16, 16), "paper_32f": (32, 8)}.get(preset, (8, 16))
    assert (own["num_frames"], own["stride"], own["sampling"], own["position"]) == (*frames, "dense", "random")
    assert (own["randaugment"], own["scale"]) == ("rand-m7-n4-mstd0.5-inc1", [0.08, 1.0])
    assert own["flip"] == (0.0 if reference else 0.5)
    assert (model["preset"], model["backbone_dtype"]) == (("reference", "fp16") if reference else ("paper", "bf16"))
    assert run["precision"] == ("16-mixed" if reference else "bf16-mixed")


def command(folder: Path, clip: str, *more: str, batch_size: int = 4) -> list[str]:
    """fit-evl on videos of colours below a folder, but for --out."""
    clips = {"format": "list", "path": str(folder / "list.txt"), "root": str(folder)}
    own = flags(
        train=clips, val=clips, labels=str(folder / "labels.csv"), num_frames=3, size=32, stride=1, num_workers=0,
        batch_size=batch_size,
    )  # fmt: skip
    quiet = [t for name in ("progress_bar", "model_summary") for t in (f"--trainer.enable_{name}", "false")]
    cpu = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.accumulate_grad_batches", "1"]
    model = ["--model.backbone", clip, "--model.overrides", json.dumps(STILL), "--model.lr", "0.01"]
    return ["fit-evl", *model, "--model.backbone_dtype", "fp32", *own, *quiet, *cpu, *more]


def test_from_a_list_of_videos_to_a_model_and_back(clip: str, videos: Path, tmp_path: Path) -> None:
    """Train to a step within an epoch, and go on from there; the decoder alone starts another run."""
    out = tmp_path / "run"
    own = command(videos, clip, "--out", str(out), "--trainer.max_steps", "8")
    assert main(own) == 0
    assert main([*own, "--ckpt_path", "last"]) == 0
    assert (out / "checkpoints" / "last.ckpt").exists()
    for folder in ("model", "best"):
        assert {path.name for path in (out / folder).iterdir()} == {
            "config.json", "decoder.pth", "labels.csv", "model.safetensors",
        }  # fmt: skip
    assert read_class_names(out / "model" / "labels.csv") == list(COLOURS)
    assert EVL.from_pretrained(out / "model").config.num_classes == 3
    start = ["--model.decoder", str(out / "model" / "decoder.pth"), "--trainer.max_steps", "1", "--model.lr", "0"]
    more = [*start, "--model.overrides", "null", "--out", str(tmp_path / "again")]
    assert main(command(videos, clip, *more)) == 0
    one, two = (EVL.from_pretrained(tmp_path / run / "model").state_dict() for run in ("run", "again"))
    assert not [name for name in one if not torch.equal(one[name], two[name])]


def test_an_existing_run_is_not_written_over(clip: str, videos: Path, tmp_path: Path, capsys: Any) -> None:
    own = command(videos, clip, "--out", str(tmp_path / "run"), "--trainer.max_steps", "1")
    assert main(own) == 0
    assert main(own) == 1
    assert "holds a run; go on with --ckpt_path last" in capsys.readouterr().err


def test_two_processes_share_the_features_and_learn_what_one_does(clip: str, videos: Path, tmp_path: Path) -> None:
    fixed = ["--data.augment", "false", "--data.position", "centre", "--trainer.max_steps", "5"]
    for world in (1, 2):
        cache = ["--data.cache", str(tmp_path / f"cache{world}"), "--data.cache_dtype", "float32"]
        spread = ["--trainer.devices", str(world), "--trainer.strategy", "ddp", "--out", str(tmp_path / str(world))]
        given = command(videos, clip, *fixed, *cache, *spread, batch_size=4 // world)
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        done = subprocess.run([sys.executable, "-m", "mmfast", *given], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "cache2" / "train").glob("*.safetensors"))) == 2
    one, two = (EVL.from_pretrained(tmp_path / world / "model").state_dict() for world in ("1", "2"))
    for name in one:
        if not name.endswith("k_proj.bias"):  # whose gradients are rounding alone
            torch.testing.assert_close(two[name], one[name], atol=1e-4, rtol=1e-3, msg=name)


def test_synthetic_clips_can_be_cached_too(clip: str, tmp_path: Path) -> None:
    def made(split: str) -> dict[str, Any]:
        return {"format": "synthetic", "path": "source", "split": split, "options": {"clips_per_class": 1}}

    own = flags(
        train=made("train"), val=made("test"), num_frames=4, size=32, num_workers=0, batch_size=4, augment=False,
        position="centre", cache=str(tmp_path / "cache"),
    )  # fmt: skip
    model = ["--model.backbone", clip, "--model.overrides", json.dumps(STILL), "--out", str(tmp_path / "run")]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu", "--trainer.max_steps", "3"]
    assert main(["fit-evl", *model, *own, *quiet, "--trainer.accumulate_grad_batches", "1"]) == 0
    assert EVL.from_pretrained(tmp_path / "run" / "model").config.num_classes == 16
    assert len(read_class_names(tmp_path / "run" / "model" / "labels.csv")) == 16
