"""The progress bar of the stages, where epochs or trainer.max_steps end a run."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning")
from stages_fakes import DECODER, TINY, pretrain_data, pretrain_stage, trainer

from mmfast.stages import progress
from mmfast.stages.run import StageCLI

pytestmark = pytest.mark.filterwarnings("ignore")


class Seen:
    """What a bar says at the start of every epoch."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_epoch_start(trainer, pl_module)  # type: ignore[misc]
        self.__dict__.setdefault("totals", []).append(self.total_train_batches)  # type: ignore[attr-defined]
        describe = getattr(self, "_get_train_description")  # noqa: B009
        self.__dict__.setdefault("texts", []).append(describe(trainer.current_epoch).strip())


class Rich(Seen, progress.RichBar):
    pass


def shown(**settings: Any) -> tuple[list[str], list[int]]:
    """Descriptions and totals of a run whose epochs have 5 batches of 2 clips."""
    bar = Rich()
    given = dict(enable_checkpointing=False, enable_progress_bar=True, **settings)
    trainer([bar], **given).fit(pretrain_stage(warmup_epochs=0), pretrain_data())
    return bar.__dict__["texts"], bar.__dict__["totals"]


def test_epochs_are_counted_as_lightning_does() -> None:
    assert shown(max_epochs=2) == (["Epoch 0/1", "Epoch 1/1"], [5, 5])


def test_max_steps_says_how_many_epochs_that_makes_and_where_the_last_ends() -> None:
    assert shown(max_epochs=None, max_steps=12) == (["Epoch 0/2", "Epoch 1/2", "Epoch 2/2"], [5, 5, 2])


def test_accumulated_batches_make_one_step() -> None:
    """An epoch of 5 batches has steps after 2, 4 and 5 of them."""
    found = shown(max_epochs=None, max_steps=4, accumulate_grad_batches=2)
    assert found == (["Epoch 0/1", "Epoch 1/1"], [5, 2])


def test_a_run_without_limits_counts_on() -> None:
    bar = progress.RichBar()
    bar._trainer = trainer(max_epochs=-1)
    assert bar._get_train_description(3).strip() == "Epoch 3"


def test_without_rich_it_is_the_plain_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(self: Any, *args: Any) -> None:
        raise ModuleNotFoundError("rich")

    assert isinstance(progress.progress_bar(), progress.RichBar)
    monkeypatch.setattr(progress.RichProgressBar, "__init__", absent)
    assert isinstance(progress.progress_bar(), progress.PlainBar)


@pytest.mark.parametrize(("flags", "kind"), [([], progress.RichBar), (["false"], None)], ids=["shown", "switched off"])
def test_the_commands_have_it(flags: list[str], kind: type | None, tmp_path: Path) -> None:
    made = {"format": "synthetic", "path": "source", "split": "train", "options": {"clips_per_class": 1}}
    data = ["--data.source", json.dumps(made), "--data.size", "32", "--data.num_frames", "4"]
    model = ["--model.target_weight", "0", "--model.overrides", json.dumps({**TINY, **DECODER})]
    cpu = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
    off = [text for flag in flags for text in ("--trainer.enable_progress_bar", flag)]
    bar = StageCLI("pretrain", [*data, *model, *cpu, *off, "--out", str(tmp_path)]).trainer.progress_bar_callback
    assert bar is None if kind is None else isinstance(bar, kind)
