"""Tiny clips and models for the tests of the stages; run as a script it pre-trains, for tests that kill the process."""

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import torch
from lightning import pytorch as pl
from torch.utils.data import Dataset

from mmfast.config import MAEConfig
from mmfast.data.records import ClipRecord
from mmfast.mae import MaskedAutoencoder
from mmfast.stages.data import Clips, DistillData, PretrainData
from mmfast.stages.distill import DistillStage
from mmfast.stages.pretrain import PretrainStage
from mmfast.stages.resume import AtomicCheckpointIO, ResumePoint

TINY = dict(img_size=32, num_frames=4, embed_dim=64, depth=1, num_heads=1)
DECODER = dict(decoder_embed_dim=64, decoder_depth=1, decoder_num_heads=1)
# Without dropout, whose draws differ from rank to rank.
PLAIN: dict[str, Any] = dict(overrides={**TINY, **DECODER, "head_drop_rate": 0.0})


class FakeClips(Dataset):
    """Clips of 3 x 4 x 32 x 32 with noise that is drawn anew each time, as augmentation is."""

    def __init__(self, clips: int, classes: int = 0, first: int = 0, modalities: tuple[str, ...] = ("rgb",)) -> None:
        self.clips, self.classes, self.first, self.modalities = clips, classes, first, modalities
        self.poison: set[int] = set()

    def __len__(self) -> int:
        return self.clips

    def __getitem__(self, index: int) -> dict[str, Any]:
        still = torch.Generator().manual_seed(index + self.first)
        item: dict[str, Any] = {
            "clip_id": index + self.first,
            "label": index % self.classes if self.classes else -1,
        }
        for modality in self.modalities:
            channels = {"rgb": 3, "flow": 2}[modality]
            clip = torch.rand(channels, 4, 32, 32, generator=still) + 0.1 * torch.rand(())
            item[modality] = clip * (float("nan") if index in self.poison else 1.0)
        return item


def pretrain_data(source: int = 10, target: int = 3, batch_size: int = 2, **settings: Any) -> PretrainData:
    data = PretrainData(Clips(path="source"), Clips(path="target"), batch_size=batch_size, num_workers=0, **settings)
    data.train_sets = {"source": FakeClips(source, 3), "target": FakeClips(target, first=100)}
    return data


def pretrain_stage(**settings: Any) -> PretrainStage:
    torch.manual_seed(0)
    given = dict(num_classes=3, overrides={**TINY, **DECODER}, mask_ratio=0.5, warmup_epochs=1, lr=0.02, min_lr=0.0)
    return PretrainStage(**{**given, "warmup_lr": 0.0, **settings})


def distill_data(target: int = 6, batch_size: int = 2, **settings: Any) -> DistillData:
    data = DistillData(
        Clips(path="target"), modalities=("rgb", "flow"), batch_size=batch_size, num_workers=0, **settings
    )
    data.train_sets = {"target": FakeClips(target, modalities=("rgb", "flow"))}
    return data


class Labelled(FakeClips):
    """Clips whose brightness is their class, `spread` from class to class."""

    spread = 2.0

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        item["rgb"] = item["rgb"] * 0.1 + self.spread * (index % 3 - 1)
        return {**item, **({"skipped": True} if index in self.poison else {})}


def validated(data: DistillData, broken: tuple[int, ...] = (), spread: float = 2.0) -> DistillData:
    """The data module with 13 clips of 3 classes to validate on."""
    clips = Labelled(13, 3)
    clips.poison, clips.spread = set(broken), spread
    records = [ClipRecord(i, f"clip {i}", label=i % 3, label_name=f"class {i % 3}") for i in range(13)]

    class Fixed(Clips):
        def read(self, modalities: Any = ()) -> Any:
            return type("Read", (), {"records": records})()

        def dataset(self, *_: Any, **__: Any) -> Any:
            return clips

    data.val = Fixed(path="val")
    return data


def encoder_file(folder: Path, channels: int = 3, **overrides: Any) -> str:
    """A pre-training model of random weights, as stage I leaves it."""
    torch.manual_seed(channels)
    MaskedAutoencoder(MAEConfig(in_chans=channels, num_classes=3, **{**TINY, **DECODER, **overrides})).save_pretrained(
        folder
    )
    return str(folder)


def distill_stage(folder: Path, **settings: Any) -> DistillStage:
    student, flow = encoder_file(folder / "rgb"), encoder_file(folder / "flow", 2)
    torch.manual_seed(0)
    small = dict(n_way=2, k_shot=1, n_query=2, episodes=10, warmup_epochs=1, mask_ratio=0.5, min_lr=0.0, warmup_lr=0.0)
    return DistillStage(**{**small, "student": student, "teachers": {"rgb": "student", "flow": flow}, **settings})


def trainer(callbacks: Any = (), **settings: Any) -> pl.Trainer:
    """A Trainer that says and writes nothing unasked."""
    torch.set_num_threads(1)
    quiet = dict(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        num_sanity_val_steps=0,
        max_epochs=3,
    )
    return pl.Trainer(callbacks=list(callbacks), plugins=[AtomicCheckpointIO()], **{**quiet, **settings})


class Losses(pl.Callback):
    """The loss of every batch."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(float(outputs["loss"]))


class Signal(pl.Callback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--kill_at", type=int)
    parser.add_argument("--signal", default="SIGKILL")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--world", type=int, default=1)
    parser.add_argument("--distill", action="store_true")
    parser.add_argument("--poison", type=int, nargs="*", default=[])
    options = parser.parse_args()
    losses = Losses()
    callbacks: list[Any] = [losses, ResumePoint(str(options.folder), every_n_epochs=None, every_n_steps=options.every)]
    if options.kill_at is not None:
        callbacks.append(Signal(options.kill_at, getattr(signal, options.signal)))
    stage, data = pretrain_stage(**({} if options.world == 1 else PLAIN)), pretrain_data()
    data.train_sets["source"].poison = set(options.poison)
    last = options.folder / "last.ckpt"
    spread = dict(devices=options.world, strategy="ddp") if options.world > 1 else {}
    if options.distill:
        own = trainer(max_epochs=2, **spread)
        own.fit(distill_stage(options.folder / str(own.global_rank)), validated(distill_data(), spread=0.02))
        accuracy = float(own.callback_metrics["val_accuracy"])
        torch.save({"val_accuracy": accuracy}, options.folder / f"found{own.global_rank}.pt")
        return
    own = trainer(callbacks, **spread)
    own.fit(stage, data, ckpt_path=last if options.resume else None, weights_only=True)
    found = {"weights": stage.loss_module.state_dict(), "losses": losses.seen, "skipped": stage.skipped}
    torch.save(found, options.folder / f"found{own.global_rank}.pt")


if __name__ == "__main__":
    main()
