"""The command line: dispatch, presets, and both stages end to end on synthetic clips."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("lightning")
from mmfast.checkpoints import load_pretrained
from mmfast.cli import main

pytestmark = pytest.mark.filterwarnings("ignore")
SYNTHETIC = {"clips_per_class": 1}
TINY = {"img_size": 32, "num_frames": 4, "embed_dim": 64, "depth": 1, "num_heads": 1}
DECODER = {"decoder_embed_dim": 64, "decoder_depth": 1, "decoder_num_heads": 1}
SMALL = [
    *("--data.size", "32", "--data.num_frames", "4", "--data.num_workers", "0", "--data.batch_size", "4"),
    *("--model.warmup_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.precision", "32-true"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
]


def clips(name: str, domain: str, split: str, **options: Any) -> list[str]:
    made = {"format": "synthetic", "path": domain, "split": split, "options": {**SYNTHETIC, **options}}
    return [f"--data.{name}", json.dumps(made)]


def pretrain(out: Path, *flags: str, modality: str = "rgb") -> int:
    data = [*clips("source", "source", "train"), *clips("target", "target", "unlabelled")]
    size = ["--model.overrides", json.dumps({**TINY, **DECODER, **({"img_size": 8} if modality == "pose" else {})})]
    where = ["--modality", modality, "--out", str(out)]
    return main(["pretrain", *where, *data, *SMALL, *size, "--trainer.max_epochs", "2", *flags])


# -- dispatch ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def light(monkeypatch: Any) -> list[list[str]]:
    """A light command in place of the real ones; what it was called with."""
    calls: list[list[str]] = []

    def convert(argv: list[str]) -> int:
        """change a checkpoint's dialect

        At length.
        """
        calls.append(argv)
        return 7

    def fail(argv: list[str]) -> int:
        """always fails"""
        raise ValueError("nothing is right")

    module = ModuleType("mmfast.commands")
    module.COMMANDS = {"convert": convert, "fail": fail}
    monkeypatch.setitem(sys.modules, "mmfast.commands", module)
    return calls


def test_a_light_command_gets_the_rest_and_gives_the_exit_code(light: list[list[str]]) -> None:
    assert main(["convert", "a", "--to", "b"]) == 7
    assert light == [["a", "--to", "b"]]


@pytest.mark.parametrize(("args", "code"), [(["--help"], 0), ([], 2)], ids=str)
def test_help_lists_every_command_with_one_line(args: list[str], code: int, light: Any, capsys: Any) -> None:
    assert main(args) == code
    said = capsys.readouterr().out
    lines = (
        "pretrain  stage I: ",
        "distill   stage II: ",
        "fit-clip  M2-CLIP: ",
        "fit-evl   EVL: ",
        "convert   change a checkpoint's dialect\n",
    )
    for line in lines:
        assert f"\n  {line}" in said
    assert "At length" not in said


def test_version(capsys: Any) -> None:
    from mmfast import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mmfast {__version__}\n"


def test_an_unknown_command_is_refused(light: Any, capsys: Any) -> None:
    assert main(["pretrian"]) == 2
    assert (
        "unknown command 'pretrian'; the commands are pretrain, distill, fit-clip, fit-evl, convert"
        in capsys.readouterr().err
    )


def test_an_error_is_one_line(light: Any, capsys: Any) -> None:
    assert main(["fail"]) == 1
    assert capsys.readouterr().err == "mmfast fail: nothing is right\n"


def test_without_lightning_the_pip_line_is_said(light: Any, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.delitem(sys.modules, "mmfast.stages.run", raising=False)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    assert main(["pretrain"]) == 2
    assert "pip install 'mmfast[train]'" in capsys.readouterr().err


def test_light_commands_do_not_import_lightning() -> None:
    code = (
        "import sys, types; m = types.ModuleType('mmfast.commands'); m.COMMANDS = {'x': lambda argv: 0}\n"
        "sys.modules['mmfast.commands'] = m\n"
        "from mmfast.cli import main; main(['--help']); main(['x'])\n"
        "sys.exit(any(name.startswith('lightning') for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


# -- presets -----------------------------------------------------------------------------------------------------------


def config(capsys: Any, *flags: str) -> dict[str, Any]:
    """What --print_config prints."""
    with pytest.raises(SystemExit) as stop:
        main([*flags, "--print_config"])
    assert stop.value.code == 0
    found: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return found


SOURCE = ["--data.source.path", "source.json"]


@pytest.mark.parametrize("preset", ["paper", "reference"])
@pytest.mark.parametrize(("modality", "ce_weight"), [("rgb", 0.05), ("flow", 0.01), ("pose", 0.01)])
def test_presets_of_pre_training(preset: str, modality: str, ce_weight: float, light: Any, capsys: Any) -> None:
    found = config(capsys, "pretrain", "--preset", preset, "--modality", modality, *SOURCE)
    model = found["model"]
    reference = preset == "reference"
    wanted = dict(lr=1.5e-4, min_lr=1e-5, warmup_lr=1e-6, warmup_epochs=10, weight_decay=0.05, betas=[0.9, 0.95])
    wanted |= dict(mask_ratio=0.9, ce_weight=ce_weight, name=f"pretrain_mmcdfsl_small_{modality}")
    wanted |= dict(target_weight=0.0 if reference else 1.0, same_mask=reference, reference=reference)
    assert {name: model[name] for name in wanted} == wanted
    assert (found["modality"], found["trainer"]["max_epochs"], found["data"]["batch_size"]) == (modality, 100, 48)
    assert (found["data"]["augment"], found["data"]["clamp"]) == (
        ("reference", False) if reference else ("joint", True)
    )


@pytest.mark.parametrize("preset", ["paper", "reference"])
def test_presets_of_distillation(preset: str, light: Any, capsys: Any) -> None:
    flags = ["--model.student", "s", "--model.teachers.flow", "f", "--data.target.path", "t.json"]
    found = config(capsys, "distill", "--preset", preset, *flags)
    model, reference = found["model"], preset == "reference"
    wanted = dict(lr=2e-3, min_lr=5e-7, warmup_lr=5e-7, warmup_epochs=5, weight_decay=0.05, betas=[0.9, 0.999])
    wanted |= dict(mask_ratio=0.75, decay_all=reference, reference=reference, fresh_fc_norm=reference, episodes=600)
    wanted |= dict(teachers={"rgb": "student", "flow": "f"})
    assert {name: model[name] for name in wanted} == wanted
    eps = model["overrides"]["norm_eps"] if reference else model["overrides"]
    assert eps == (1e-5 if reference else None)
    assert (found["trainer"]["max_epochs"], found["trainer"]["check_val_every_n_epoch"]) == (100, 5)


def test_flags_override_a_file_that_overrides_the_preset(light: Any, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "own.yaml").write_text("model:\n  mask_ratio: 0.8\n  lr: 0.001\n")
    flags = ["--config", str(tmp_path / "own.yaml"), "--model.lr", "0.002"]
    model = config(capsys, "pretrain", *SOURCE, *flags)["model"]
    assert (model["mask_ratio"], model["lr"], model["warmup_epochs"]) == (0.8, 0.002, 10)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model.mask_ration", "0.5"], "mask_ration"),
        (["--preset", "papers"], "papers"),
        (["--modality", "depth"], "depth"),
        (["--model.mask_ratio", "much"], "mask_ratio"),
        (["--data.source.format", "ego5d"], "ego5d"),
    ],
    ids=str,
)
def test_what_no_one_knows_is_refused_by_name(flags: list[str], said: str, light: Any, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["pretrain", *SOURCE, *flags])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_an_unknown_key_of_a_file_is_refused(light: Any, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "own.yaml").write_text("model:\n  mask_ration: 0.8\n")
    with pytest.raises(SystemExit) as stop:
        main(["pretrain", *SOURCE, "--config", str(tmp_path / "own.yaml")])
    assert stop.value.code == 2
    assert "mask_ration" in capsys.readouterr().err


# -- end to end --------------------------------------------------------------------------------------------------------


def test_both_stages_end_to_end(light: Any, tmp_path: Path, capsys: Any) -> None:
    """Pre-train RGB and pose, distil from both, go on with a run, refuse to write over one."""
    rgb, pose, student = tmp_path / "rgb", tmp_path / "pose", tmp_path / "student"
    assert pretrain(rgb, "--trainer.log_every_n_steps", "1") == 0
    assert pretrain(pose, "--model.init", str(rgb / "model"), modality="pose") == 0
    assert load_pretrained(pose / "model").config.in_chans == 21

    with (rgb / "logs" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {"total", "ce", "total_epoch", "skipped", "lr-AdamW/decay"} <= rows[0].keys()
    assert (rgb / "logs" / "version_0" / "config.yaml").exists()

    assert pretrain(rgb) == 1
    assert f"--out {rgb} holds a run; go on with --ckpt_path last" in capsys.readouterr().err
    before = load_pretrained(rgb / "model").state_dict()
    assert pretrain(rgb, "--ckpt_path", "last", "--trainer.max_epochs", "3") == 0
    after = load_pretrained(rgb / "model").state_dict()
    assert not torch.equal(before["head.weight"], after["head.weight"])

    teachers = {"rgb": "student", "pose": str(pose / "model")}
    code = main(
        [
            "distill",
            *("--out", str(student), "--model.student", str(rgb / "model"), "--model.teachers", json.dumps(teachers)),
            *clips("target", "target", "unlabelled"),
            *clips("val", "target", "test", clips_per_class=3),
            *clips("source", "source", "train"),
            *("--model.n_query", "2", "--model.k_shot", "1", "--model.episodes", "10", "--model.n_way", "3"),
            *SMALL,
            *("--trainer.max_epochs", "2", "--trainer.check_val_every_n_epoch", "1"),
        ]
    )
    assert code == 0
    names = sorted(path.name for path in (student / "checkpoints").iterdir())
    assert len(names) == 3
    assert [name.partition("=")[0] for name in names] == ["epoch", "epoch", "last.ckpt"]
    for folder in ("model", "best"):
        found = load_pretrained(student / folder)
        assert (found.config.num_classes, found.config.embed_dim) == (0, 64)


def test_the_reference_preset_needs_no_target(light: Any, tmp_path: Path) -> None:
    code = main(
        [
            *("pretrain", "--preset", "reference", "--out", str(tmp_path), *clips("source", "source", "train")),
            *SMALL,
            *("--model.overrides", json.dumps({**TINY, **DECODER}), "--trainer.max_epochs", "2"),
        ]
    )
    assert code == 0


def test_classes_that_both_domains_have_are_refused(light: Any, tmp_path: Path, capsys: Any) -> None:
    assert pretrain(tmp_path, *clips("test", "source", "test")) == 1
    assert "mmfast pretrain: source and target share 16 of the target's 16 classes" in capsys.readouterr().err


def test_last_of_a_run_that_has_none_starts_from_the_beginning(light: Any, tmp_path: Path) -> None:
    assert pretrain(tmp_path, "--ckpt_path", "last") == 0


def test_a_missing_checkpoint_is_an_error_of_one_line(light: Any, tmp_path: Path, capsys: Any) -> None:
    assert pretrain(tmp_path, "--ckpt_path", str(tmp_path / "no.ckpt")) == 1
    assert "no.ckpt" in capsys.readouterr().err.splitlines()[-1]


def distill(out: Path, student: Path, *flags: str) -> int:
    what = ["--model.student", str(student), "--model.teachers", json.dumps({"rgb": "student"})]
    data = clips("target", "target", "unlabelled")
    return main(["distill", "--out", str(out), *what, *data, *SMALL, "--trainer.max_epochs", "2", *flags])


def test_checkpoints_of_another_stage_are_refused(light: Any, tmp_path: Path, capsys: Any) -> None:
    rgb, student = tmp_path / "rgb", tmp_path / "student"
    assert pretrain(rgb) == 0
    assert list((rgb / "logs" / "version_0").glob("events.out.tfevents*"))  # TensorBoard's, beside the table
    last = rgb / "checkpoints" / "last.ckpt"
    assert distill(student, rgb / "model", "--ckpt_path", str(last)) == 1
    assert "ckpt_path must be a checkpoint of this very run, got one of another" in capsys.readouterr().err
    assert distill(student, last) == 1
    assert "the model it made is in the folder model" in capsys.readouterr().err
    assert distill(student, tmp_path / "none") == 1
    assert f"{tmp_path / 'none'}" in capsys.readouterr().err


def test_overfitting_batches_is_refused_with_another_way(light: Any, tmp_path: Path, capsys: Any) -> None:
    assert pretrain(tmp_path, "--trainer.overfit_batches", "2") == 1
    assert "trainer.overfit_batches must be 0 here, got 2" in capsys.readouterr().err
