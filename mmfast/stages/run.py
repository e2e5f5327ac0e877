"""`mmfast pretrain`, `distill`, `fit-clip` and `fit-evl`: presets, flags and files to a Trainer, by LightningCLI."""

import argparse
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from .data import DistillData, PretrainData
from .distill import DistillStage
from .fit_clip import FitClipStage
from .fit_clip_data import FitClipData
from .fit_evl import FitEvlStage
from .fit_evl_data import FitEvlData
from .pretrain import PretrainStage
from .progress import progress_bar
from .resume import AtomicCheckpointIO, Export, Faults, ResumePoint

PRESETS = Path(__file__).parent / "presets"
STAGES: dict[str, tuple[type[LightningModule], type[LightningDataModule]]] = {
    "pretrain": (PretrainStage, PretrainData),
    "distill": (DistillStage, DistillData),
    "fit-clip": (FitClipStage, FitClipData),
    "fit-evl": (FitEvlStage, FitEvlData),
}
CHOICES = {
    "fit-clip": ("paper", "k400", "ssv2", "reference"),
    "fit-evl": ("paper", "paper_16f", "paper_32f", "reference"),
}
INTERRUPTED = 130  # as shells have it


def run(stage: str, args: Sequence[str]) -> int:
    """Train a stage as the flags say.   Returns 0, or 130 when Ctrl-C ended it. Raises SystemExit, ValueError, OSError."""
    cli = StageCLI(stage, args)
    cli.check_folder()
    try:
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.resume_from(), weights_only=True)
    except SystemExit:  # Lightning's, after Ctrl-C
        return INTERRUPTED
    return 0


class StageCLI(LightningCLI):
    """LightningCLI with a preset as its defaults, one folder for all that a run writes, and our callbacks."""

    def __init__(self, stage: str, args: Sequence[str]) -> None:
        self.stage = stage
        model, data = STAGES[stage]
        with warnings.catch_warnings():
            # Whoever calls main() with arguments of its own means them.
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            super().__init__(
                model,
                data,
                save_config_kwargs={"overwrite": True},
                seed_everything_default=42,
                parser_kwargs={
                    "prog": f"mmfast {stage}",
                    "description": (model.__doc__ or "").partition("\n")[0],
                    "default_config_files": [str(preset_file(stage, args))],
                },
                args=list(args),
                run=False,
                auto_configure_optimizers=False,
            )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        choices = CHOICES.get(self.stage, ("paper", "reference"))
        parser.add_argument("--preset", default="paper", choices=list(choices), help="As in the paper, or as released")
        parser.add_argument("--out", default=f"runs/{self.stage}", help="Folder for checkpoints, logs and the model")
        parser.add_argument(
            "--ckpt_path", type=str | None, default=None, help='Checkpoint to go on from; "last" is the one in --out'
        )
        parser.add_class_arguments(ResumePoint, "checkpoint", skip={"folder"}, instantiate=False)
        if self.stage == "pretrain":
            parser.add_argument(
                "--modality", default="rgb", choices=["rgb", "flow", "pose"], help="Modality to train on"
            )
            parser.link_arguments("modality", "model.modality")
            parser.link_arguments("modality", "data.modality")
            parser.link_arguments("model.target_weight", "data.with_target", compute_fn=_above_zero)
            parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        elif self.stage == "fit-clip":
            parser.link_arguments("data.num_frames", "model.num_frames")
            parser.link_arguments("data.captions", "model.captions", apply_on="instantiate")
        elif self.stage == "fit-evl":
            parser.link_arguments("data.num_frames", "model.num_frames")
            parser.link_arguments("data.size", "model.size")
            parser.link_arguments("data.names", "model.names", apply_on="instantiate")
        else:
            parser.link_arguments("model.teachers", "data.modalities", compute_fn=_names)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        settings = self.config_init["trainer"]
        if settings["overfit_batches"]:
            # Lightning would take the sampler away by which a run shares and orders its clips.
            raise ValueError(
                f"trainer.overfit_batches must be 0 here, got {settings['overfit_batches']}; to see whether a model can "
                "learn a few clips by heart, give a manifest of those alone"
            )
        callbacks = [
            LearningRateMonitor("step"),
            Faults(),
            ResumePoint(str(self.checkpoints), **self.config_init["checkpoint"].as_dict()),
            Export(str(self.out / "model")),
        ]
        if getattr(self.datamodule, "val", None) is not None:
            callbacks.append(Export(str(self.out / "best"), monitor="val_accuracy"))
            callbacks.append(
                ModelCheckpoint(
                    self.checkpoints,
                    "{epoch}-{val_accuracy:.2f}",
                    monitor="val_accuracy",
                    mode="max",
                    save_top_k=5,
                    save_on_train_epoch_end=False,
                )
            )
        given = _several(settings["callbacks"])
        shown = settings["enable_progress_bar"] is not False and not settings["barebones"]
        if shown and not any(isinstance(callback, ProgressBar) for callback in given):
            callbacks.append(progress_bar())
        own = {"default_root_dir": str(self.out), "callbacks": [*given, *callbacks]}
        plugins = _several(settings["plugins"])
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        own["plugins"] = plugins
        if settings["logger"] in (None, True):
            logs: dict[str, Any] = dict(save_dir=str(self.out), name="logs")
            board = any(find_spec(name) for name in ("tensorboard", "tensorboardX"))
            table = CSVLogger(**logs)
            own["logger"] = [table, *([TensorBoardLogger(**logs, version=table.version)] if board else [])]
        return super().instantiate_trainer(**{**own, **kwargs})

    @property
    def out(self) -> Path:
        return Path(self.config["out"])

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"

    def check_folder(self) -> None:
        """Raise ValueError rather than write over another run."""
        last = self.checkpoints / "last.ckpt"
        if self.config["ckpt_path"] is None and last.exists() and not self.config["trainer"]["fast_dev_run"]:
            raise ValueError(f"--out {self.out} holds a run; go on with --ckpt_path last, or choose another folder")

    def resume_from(self) -> str | None:
        """The checkpoint that ckpt_path means."""
        given = self.config["ckpt_path"]
        if given != "last":
            return given
        last = self.checkpoints / "last.ckpt"
        if last.exists():
            return str(last)
        rank_zero_info(f"there is no {last} yet: training starts from the beginning")
        return None


def preset_file(stage: str, args: Sequence[str]) -> Path:
    """The preset that the flags name. Wrong names are left to the parser."""
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    scan.add_argument("--preset", default="paper")
    scan.add_argument("--modality", default="rgb")
    found, _ = scan.parse_known_args(args)
    name = f"{stage.replace('-', '_')}_{found.preset}" + (f"_{found.modality}" if stage == "pretrain" else "")
    return PRESETS / f"{name}.yaml"


def _above_zero(weight: float) -> bool:
    return weight > 0


def _names(teachers: dict[str, str]) -> tuple[str, ...]:
    return tuple(teachers)


def _several(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]
