"""The stage that fits M2-CLIP: what trains, how fast, what its checkpoints hold, going on, validation, and the command."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

pytest.importorskip("lightning")
from fit_clip_makers import (
    COLOURS,
    HIDDEN,
    MERGES,
    flags,
    write_clip_model,
    write_labels,
    write_videos,
    write_vocabulary,
)
from stages_fakes import FakeClips, Losses, trainer

from mmfast import M2CLIP
from mmfast.cli import main
from mmfast.data.captions import Captions
from mmfast.data.tokenizer import ClipTokenizer
from mmfast.data.video_lists import label_words, read_class_names
from mmfast.stages.data import Clips
from mmfast.stages.fit_clip import FitClipStage
from mmfast.stages.fit_clip_data import FitClipData
from mmfast.stages.resume import Export, ResumePoint

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = list(COLOURS)
# Behind the last attention the class token alone counts, to which the adapter's spatial branch adds nothing.
IDLE = "clip.visual.transformer.resblocks.1.adapter_pre_mlp.offset_adapter."


class Coloured(FakeClips):
    """Clips 3 x 4 x 32 x 32 whose channel that is brightest is their class."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        bright = torch.eye(3)[index % 3][:, None, None, None]
        return {**item, "rgb": 0.2 * item["rgb"] + 3 * bright - 1}


def captions(words: bool = True) -> Captions:
    return Captions(ClipTokenizer(MERGES), NAMES, label_words(NAMES) if words else None)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_clip_model(tmp_path_factory.mktemp("clip")))


def stage(clip: str, **settings: Any) -> FitClipStage:
    torch.manual_seed(0)
    given: dict[str, Any] = dict(preset="k400", num_frames=4, overrides=HIDDEN, lr=0.3, warmup_epochs=1)
    return FitClipStage(clip, **{**given, "captions": captions(), **settings})


def data(clips: int = 12, batch_size: int = 4, val: Any = None) -> FitClipData:
    own = FitClipData(Clips(path="train"), batch_size=batch_size, num_workers=0, num_frames=4, size=32)
    own.train_sets = {"train": Coloured(clips, 3)}
    if val is not None:
        own.val_dataloader = lambda: own._placed(val, len(val))  # type: ignore[method-assign]
    return own


def weights(own: FitClipStage) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in own.state_dict().items()}


# -- what trains, and how ----------------------------------------------------------------------------------------------


def test_adapters_move_the_clip_does_not_and_the_loss_falls(clip: str) -> None:
    own, losses = stage(clip), Losses()
    start = weights(own)
    trainer([losses], enable_checkpointing=False, max_epochs=6).fit(own, data())
    moved = {name for name, tensor in weights(own).items() if not torch.equal(tensor, start[name])}
    # Behind the last attention the class token alone counts, to which that adapter's spatial branch adds nothing.
    idle = "loss_module.clip.visual.transformer.resblocks.1.adapter_pre_mlp.offset_adapter."
    assert {n for n in moved if not n.startswith(idle)} == {
        n for n in start if "adapter" in n and not n.startswith(idle)
    }
    assert sum(losses.seen[-3:]) < 0.7 * sum(losses.seen[:3])


@pytest.mark.parametrize("preset", ["k400", "ssv2", "paper", "reference"])
def test_every_number_that_trains_has_a_gradient_and_an_optimiser_state(preset: str, clip: str) -> None:
    """So that DDP waits for nothing."""
    own = stage(clip, preset=preset)
    items = [Coloured(6, 3)[i] for i in range(6)]
    batch = {"rgb": torch.stack([i["rgb"] for i in items]), "label": torch.tensor([i["label"] for i in items])}
    losses = own.losses({"train": batch})
    losses["total"].backward()
    lacking = [name for name, p in own.named_parameters() if p.requires_grad and p.grad is None]
    assert not lacking
    assert all(p.grad is None for p in own.parameters() if not p.requires_grad)
    listed = [p for group in own.groups(0.1) for p in group["params"]]
    assert {id(p) for p in listed} == {id(p) for p in own.parameters() if p.requires_grad}
    words = [name for name, p in own.named_parameters() if "mlm_adapter" in name and p.requires_grad]
    assert bool(words) == (preset != "reference")


def test_rates_follow_the_batch_and_the_group(clip: str) -> None:
    class Rates(Losses):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            optimizer = trainer.optimizers[0]
            self.seen.append({g["name"]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups})  # type: ignore[arg-type]

        def on_train_batch_end(self, *_: Any) -> None: ...

    rates: Any = Rates()
    own = trainer([rates], enable_checkpointing=False, max_epochs=4)
    own.fit(stage(clip, lr=0.256, warmup_epochs=1, text_lr_scale=0.25), data(clips=6, batch_size=2))
    lrs = [{name: lr for name, (lr, _) in step.items()} for step in rates.seen]
    assert lrs[0]["decay"] == 0
    assert max(step["decay"] for step in lrs) == pytest.approx(0.256 * 2 / 256)
    assert all(step["text_decay"] == pytest.approx(0.25 * step["decay"]) for step in lrs)
    assert lrs[-1]["decay"] < 0.1 * 0.256 * 2 / 256
    decays = {name: decay for name, (_, decay) in rates.seen[0].items()}
    assert decays == {"decay": 0.01, "no_decay": 0.0, "text_decay": 0.01, "text_no_decay": 0.0}


def test_what_no_loss_reaches_is_frozen(clip: str) -> None:
    own = stage(clip, weights={"contrastive": 0.0, "cmc": 0.0, "cmlm": 0.0}).model
    trained = {name for name, p in own.named_parameters() if p.requires_grad}
    assert trained == {n for n in own.state_dict() if "adapter" in n and n.startswith(("adapter_fc", "clip.visual"))}


def test_tube_masks_change_what_is_learnt_from(clip: str) -> None:
    seen = []
    for ratio in (0.0, 0.5):
        losses = Losses()
        trainer([losses], enable_checkpointing=False, max_epochs=1, limit_train_batches=1).fit(
            stage(clip, mask_ratio=ratio, warmup_epochs=0), data()
        )
        seen += losses.seen
    assert seen[0] != seen[1]


def test_words_are_masked_anew_in_every_step_and_alike_in_every_run(clip: str, monkeypatch: Any) -> None:
    drawn: list[list[int]] = []
    masked = Captions.masked

    def noted(self: Captions, labels: Any, generator: Any = None) -> Any:
        found = masked(self, labels, generator)
        drawn.append(found[0].flatten().tolist())
        return found

    monkeypatch.setattr(Captions, "masked", noted)
    for _ in range(2):
        trainer(max_epochs=2).fit(stage(clip), data(clips=4))
    assert drawn[:2] == drawn[2:]
    assert drawn[0] != drawn[1]


def test_bf16_trains(clip: str) -> None:
    losses = Losses()
    own = stage(clip)
    trainer([losses], enable_checkpointing=False, max_epochs=6, precision="bf16-mixed").fit(own, data())
    assert sum(losses.seen[-3:]) < 0.8 * sum(losses.seen[:3])
    assert all(p.dtype == torch.float32 for p in own.parameters())


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_what_trains_and_a_run_goes_on_bit_for_bit(clip: str, tmp_path: Path) -> None:
    own = stage(clip)
    trainer([ResumePoint(str(tmp_path / "whole"))]).fit(own, data())
    wanted = weights(own)
    cut = stage(clip)
    trainer([ResumePoint(str(tmp_path), every_n_steps=1)], max_steps=4).fit(cut, data())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == {name for name in wanted if "adapter" in name}
    again = stage(clip)
    trainer().fit(again, data(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    found = weights(again)
    assert not [name for name in wanted if not torch.equal(found[name], wanted[name])]


def test_a_checkpoint_on_another_clip_is_refused(clip: str, tmp_path: Path) -> None:
    trainer([ResumePoint(str(tmp_path))], max_epochs=2).fit(stage(clip), data())
    other = stage(str(write_clip_model(tmp_path / "other", seed=1)))
    with pytest.raises(ValueError, match="one that was trained on another CLIP"):
        trainer().fit(other, data(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)


def test_the_model_is_exported_with_its_adapters_and_the_names_of_its_classes(clip: str, tmp_path: Path) -> None:
    own = stage(clip)
    trainer([Export(str(tmp_path / "model"))], enable_checkpointing=False).fit(own, data())
    video = torch.randn(2, 3, 4, 32, 32)
    with torch.no_grad():
        wanted = own.model.eval()(video)
        assert torch.equal(M2CLIP.from_pretrained(tmp_path / "model")(video), wanted)
        again = M2CLIP.from_pretrained(clip, 4, adapters=tmp_path / "model" / "adapters.pth")
        torch.testing.assert_close(again(video), wanted)
    assert read_class_names(tmp_path / "model" / "labels.csv") == NAMES


# -- validation --------------------------------------------------------------------------------------------------------


def test_validation_scores_head_and_texts_and_leaves_out_what_cannot_be_read(clip: str) -> None:
    class Broken(Coloured):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {**super().__getitem__(index), **({"skipped": True} if index in (4, 5) else {})}

    own = stage(clip)
    found = trainer(max_epochs=8)
    found.fit(own, data(val=Broken(9, 3), batch_size=2))  # of one batch nothing is left
    shown = {name: float(value) for name, value in found.callback_metrics.items() if name.startswith("val_")}
    assert shown.keys() == {"val_accuracy", "val_top5", "val_text_accuracy", "val_text_top5"}
    assert shown["val_accuracy"] > 80
    assert shown["val_top5"] == shown["val_text_top5"] == 100


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(weights={"mlm": 1.0}), "weights must be of contrastive, cmc, vc, cmlm, got 'mlm'"),
        (dict(text_lr_scale=0.0), r"text_lr_scale must lie in \(0, 1\], got 0.0"),
        (dict(mask_ratio=1.0), r"mask_ratio must lie in \(0, 1\), or be 0, got 1.0"),
        (dict(preset="k600"), "unknown preset 'k600'"),
        (dict(captions=Captions(ClipTokenizer([]), NAMES)), "which has 521 tokens, got one of 514"),
        (dict(overrides={"hidden": 3}), "unknown config field 'hidden'"),
    ],
    ids=["weights", "text_lr_scale", "mask_ratio", "preset", "captions", "overrides"],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str, clip: str) -> None:
    with pytest.raises(ValueError, match=message):
        stage(clip, **settings)


def test_clips_without_rgb_are_refused(clip: str) -> None:
    with pytest.raises(ValueError, match="have no rgb, which a CLIP sees; they have clip_id, label"):
        stage(clip).losses({"train": {"clip_id": torch.zeros(1), "label": torch.zeros(1)}})


def read(tmp_path: Path, **settings: Any) -> FitClipData:
    return FitClipData(**{"train": Clips("list", str(tmp_path / "list.txt")), **settings})


def test_what_the_data_lack_is_said(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a.mp4 0\nb.mp4 5\n")
    write_labels(tmp_path / "labels.csv")
    write_vocabulary(tmp_path)
    with pytest.raises(ValueError, match=r"data.labels must be given, a CSV table"):
        _ = read(tmp_path).captions
    with pytest.raises(ValueError, match=r"data.train: b.mp4 has label 5, there are 3 classes"):
        read(tmp_path, labels=str(tmp_path / "labels.csv")).setup()
    with pytest.raises(ValueError, match="open_clip_torch"):
        _ = read(tmp_path, labels=str(tmp_path / "labels.csv")).captions
    made = Clips("synthetic", "source", split="unlabelled", options={"clips_per_class": 1})
    with pytest.raises(ValueError, match="data.train must be labelled: none of its 16 clips is"):
        _ = FitClipData(made).names
    with pytest.raises(ValueError, match="short_side must be"):
        read(tmp_path, short_side=(0.5, 1.0))


def test_classes_of_folders_go_by_name(tmp_path: Path) -> None:
    for place in ("train/a", "train/b", "train/c", "val/c", "val/b", "other/d"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "1.mp4").write_bytes(b"")
    own = FitClipData(Clips("folder", str(tmp_path / "train")), Clips("folder", str(tmp_path / "val")), num_workers=0)
    assert own.names == ["a", "b", "c"]
    assert own._labelled("val", own.val).labels == [1, 2]  # type: ignore[arg-type]
    other = FitClipData(Clips("folder", str(tmp_path / "train")), Clips("folder", str(tmp_path / "other")))
    with pytest.raises(ValueError, match=r"data.val has classes that have no name in data.labels or data.train: d"):
        other.val_dataloader()


# -- the command -------------------------------------------------------------------------------------------------------


def config(capsys: Any, *given: str) -> dict[str, Any]:
    with pytest.raises(SystemExit) as stop:
        main(["fit-clip", *given, "--model.clip", "c", "--data.train.path", "t", "--print_config"])
    assert stop.value.code == 0
    found: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("preset", ["paper", "k400", "ssv2", "reference"])
def test_presets_are_the_scripts(preset: str, capsys: Any) -> None:
    found = config(capsys, "--preset", preset)
    model, own = found["model"], found["data"]
    wanted = dict(lr=1e-3, min_lr=0.0, text_lr_scale=0.5, warmup_epochs=2, weight_decay=0.01, mask_ratio=0.0)
    assert {name: model[name] for name in wanted} == wanted
    assert (model["preset"], model["gather"]) == (preset, preset != "reference")
    ssv2 = preset == "ssv2"
    assert (found["trainer"]["max_epochs"], own["batch_size"]) == ((50, 32) if ssv2 else (12, 36))
    assert (own["sampling"], own["flip"], own["stride"]) == (("uniform", 0.0, 16) if ssv2 else ("dense", 0.5, 16))
    assert own["randaugment"] == ("rand-m7-n4-mstd0.5-inc1" if ssv2 else None)
    assert found["trainer"]["precision"] == ("16-mixed" if preset == "reference" else "bf16-mixed")
    assert own["train"]["format"] == "list"


def command(folder: Path, clip: str, *, batch_size: int = 4) -> list[str]:
    """fit-clip on videos of colours below a folder, but for --out."""
    listed, names, vocabulary = write_videos(folder), write_labels(folder / "labels.csv"), write_vocabulary(folder)
    clips = {"format": "list", "path": str(listed), "root": str(folder)}
    own = flags(
        train=clips, val=clips, labels=str(names), vocabulary=str(vocabulary), num_frames=3, size=32, stride=1,
        num_workers=0, batch_size=batch_size,
    )  # fmt: skip
    quiet = [t for name in ("progress_bar", "model_summary") for t in (f"--trainer.enable_{name}", "false")]
    cpu = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
    return ["fit-clip", "--preset", "ssv2", "--model.clip", clip, "--model.lr", "0.3", *own, *quiet, *cpu]


def test_two_processes_learn_what_one_does(clip: str, tmp_path: Path) -> None:
    """Clips of both are negatives for both; without what is drawn by rank, dropout and masked words."""
    still = ["--model.overrides", json.dumps({**HIDDEN, "class_dropout": 0.0}), "--model.weights", '{"cmlm": 0}']
    still += ["--trainer.max_epochs", "3", "--seed_everything", "1"]
    for world in (1, 2):
        out = ["--out", str(tmp_path / str(world)), "--trainer.devices", str(world), "--trainer.strategy", "ddp"]
        given = [*command(tmp_path, clip, batch_size=4 // world), *still, *out]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        done = subprocess.run([sys.executable, "-m", "mmfast", *given], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    one, two = (M2CLIP.from_pretrained(tmp_path / world / "model").state_dict() for world in ("1", "2"))
    idle = f"{IDLE}fc2.bias"  # whose gradients are rounding alone
    for name in one.keys() - {idle}:
        torch.testing.assert_close(two[name], one[name], atol=1e-4, rtol=1e-3, msg=name)


def test_from_a_list_of_videos_to_the_table(clip: str, tmp_path: Path, capsys: Any) -> None:
    """Train, go on, and evaluate what came of it: with other names the same."""
    own = [*command(tmp_path, clip), "--model.overrides", json.dumps(HIDDEN)]
    out, listed, vocabulary = tmp_path / "run", tmp_path / "list.txt", tmp_path / "merges.txt"
    assert main([*own, "--out", str(out), "--trainer.max_epochs", "4"]) == 0
    assert main([*own, "--out", str(out), "--trainer.max_epochs", "6", "--ckpt_path", "last"]) == 0
    names_of_files = sorted(path.name.partition("=")[0] for path in (out / "checkpoints").iterdir())
    assert names_of_files[-1] == "last.ckpt"
    for folder in ("model", "best"):
        assert {path.name for path in (out / folder).iterdir()} == {
            "adapters.pth", "config.json", "labels.csv", "model.safetensors",
        }  # fmt: skip
    capsys.readouterr()
    table = [
        "evaluate",
        str(listed),
        "--protocol",
        "multiview",
        "--checkpoint",
        str(out / "best"),
        "--root",
        str(tmp_path),
    ]
    more = [
        "--vocabulary",
        str(vocabulary),
        "--stride",
        "1",
        "--out",
        str(tmp_path / "e.json"),
        "--quiet",
        "--crops",
        "3",
    ]
    assert main([*table, *more]) == 0
    found = json.loads((tmp_path / "e.json").read_text())["results"]
    assert [row["scores"] for row in found] == ["class", "text"]
    assert found[0]["top1"] > 0.8


def test_synthetic_clips_bring_their_names(clip: str, tmp_path: Path) -> None:
    def made(split: str) -> dict[str, Any]:
        return {"format": "synthetic", "path": "source", "split": split, "options": {"clips_per_class": 1}}

    own = flags(
        train=made("train"), val=made("test"), vocabulary=str(write_vocabulary(tmp_path)), num_frames=4, size=32,
        num_workers=0, batch_size=4,
    )  # fmt: skip
    model = ["--model.clip", clip, "--model.overrides", json.dumps(HIDDEN), "--out", str(tmp_path / "run")]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "3"]
    assert main(["fit-clip", *model, *own, *quiet]) == 0
    assert M2CLIP.from_pretrained(tmp_path / "run" / "model").config.num_classes == 16
    assert len(read_class_names(tmp_path / "run" / "model" / "labels.csv")) == 16


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_gpu_trains_and_validates(precision: str, clip: str) -> None:
    own, losses = stage(clip, lr=0.1, grad_checkpointing="block", mask_ratio=0.25), Losses()
    found = trainer([losses], enable_checkpointing=False, max_epochs=10, precision=precision, accelerator="gpu")
    found.fit(own, data(val=Coloured(9, 3)))
    assert sum(losses.seen[-3:]) < 0.9 * sum(losses.seen[:3])
    assert float(found.callback_metrics["val_accuracy"]) > 60
    assert own.skipped == 0
