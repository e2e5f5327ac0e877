"""Packages of ensemble: the same numbers, in torch's operators alone, in a process that has no mmfast."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_runs import run, write_checkpoint
from numerics import relative_error
from test_vit import clips, make
from torch import Tensor

from mmfast import MaskedViT, tube_masks
from mmfast.package import package_ensemble
from mmfast.programs import EnsembleProgram

TOLERANCE = 1e-5
IDS, SEED = [9, 4, 2**40], 2**63 - 5
LOADERS = {
    "aoti": "import torch._inductor; program = torch._inductor.aoti_load_package(sys.argv[1])",
    "export": "program = torch.export.load(sys.argv[1]).module()",
}
ALONE = """
import sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mmfast", "mmfast_kernels"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Nothing())
import torch
{load}
given = torch.load(sys.argv[2])
torch.save([program(*inputs) for inputs in given], sys.argv[3])
assert not any(name.startswith("mmfast") for name in sys.modules)
"""
KINDS: dict[str, dict[str, Any]] = {
    "videomae": {},
    "mmcdfsl": dict(final_norm=True, norm_eps=1e-5),
    "first-token": dict(final_norm=True, fc_norm=False, pool="first"),
    "layerscale": dict(init_values=0.1, qkv_bias="full"),
    "quick": dict(gelu="quick", qkv_bias="none"),
    "flow": dict(in_chans=2),
}


def raw_clips(model: MaskedViT, batch: int = 3) -> Tensor:
    draw = torch.Generator().manual_seed(batch)
    return torch.randint(0, 256, clips(model, batch).shape, dtype=torch.uint8, generator=draw)


def inputs(video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    device = video.device
    return video, torch.tensor(IDS[: len(video)], device=device), torch.tensor(SEED, device=device)


def run_alone(kind: str, package: Path, given: list[tuple[Tensor, ...]], folder: Path) -> list[Tensor]:
    """The package's answers in a process of its own that cannot import mmfast."""
    torch.save(given, folder / "in.pt")
    script = ALONE.format(load=LOADERS[kind])
    subprocess.run([sys.executable, "-c", script, package, folder / "in.pt", folder / "out.pt"], check=True, cwd=folder)
    return torch.load(folder / "out.pt")


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_program_is_ensemble(kind: str) -> None:
    model = make(depth=2, **KINDS[kind])
    raw = raw_clips(model)
    program = EnsembleProgram(model, 2, 0.75, None)
    expected = model.ensemble(raw, 2, 0.75, seed=SEED, clip_ids=IDS)
    assert relative_error(program(*inputs(raw)), expected) <= TOLERANCE


@torch.no_grad()
def test_normalised_clips_and_a_count_of_cells() -> None:
    model = make(depth=1)
    video = clips(model, 3)
    expected = model.ensemble(video, 3, keep=5, seed=SEED, clip_ids=IDS)
    assert relative_error(EnsembleProgram(model, 3, 0.75, 5)(*inputs(video)), expected) <= TOLERANCE


@torch.no_grad()
def test_half_precision_errs_no_more_than_twice_as_much() -> None:
    model = make(depth=2)
    raw = raw_clips(model)
    masks = tube_masks(3, 2, model.config.grid, 0.75, seed=SEED, clip_ids=IDS)
    truth = model.double().ensemble(raw, masks=masks)
    model = make(depth=2).bfloat16()
    allowed = 2 * relative_error(model.ensemble(raw, masks=masks), truth)
    assert relative_error(EnsembleProgram(model, 2, 0.75, None)(*inputs(raw)), truth) <= allowed


@pytest.mark.parametrize("kind", LOADERS)
def test_a_package_runs_where_there_is_no_mmfast(kind: str, tmp_path: Path) -> None:
    model = make(depth=1)
    raw = raw_clips(model)
    package = package_ensemble(model, tmp_path / "ensemble.pt2", batch=4, kind=kind)
    assert [p.name for p in tmp_path.iterdir()] == ["ensemble.pt2"]
    batches = [raw, raw[:1].clone()]
    got = run_alone(kind, package, [inputs(b) for b in batches], tmp_path)
    for batch, probs in zip(batches, got, strict=True):
        expected = model.ensemble(batch, 2, 0.75, seed=SEED, clip_ids=IDS[: len(batch)])
        assert relative_error(probs, expected) <= TOLERANCE


def test_an_exported_graph_has_only_operators_of_torch(tmp_path: Path) -> None:
    package_ensemble(make(depth=1), tmp_path / "e.pt2", kind="export")
    graph = torch.export.load(tmp_path / "e.pt2").graph
    called = {str(n.target).split(".")[0] for n in graph.nodes if n.op == "call_function"}
    assert {name for name in called if not name.startswith("<built-in")} == {"aten"}


def test_packaging_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = make(depth=1)
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    package_ensemble(model, tmp_path / "e.pt2", kind="export")
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    assert model.fused is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kind="onnx"), "kind takes one of"),
        (dict(path="e.pt"), r"path must end in \.pt2"),
        (dict(views=0), "views must be at least 1"),
        (dict(batch=0), "batch must be at least 1"),
        (dict(keep=17), "keep must lie in"),
        (dict(mask_ratio=1.0), "mask_ratio must lie in"),
        (dict(pixels=torch.int32), "pixels takes torch.uint8 or a floating dtype"),
        (dict(model=dict(num_classes=0)), "takes a classifier"),
        (dict(classes=["one"]), "classes takes 7 names, one a class, got 1 of them"),
    ],
    ids=lambda x: str(x)[:24],
)
def test_what_does_not_fit_is_named(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = make(depth=1, **options.pop("model", {}))
    path = tmp_path / options.pop("path", "e.pt2")
    with pytest.raises(ValueError, match=message):
        package_ensemble(model, path, **options)
    assert not list(tmp_path.iterdir())


def test_a_model_in_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="call eval"):
        package_ensemble(make(depth=1).train(), tmp_path / "e.pt2")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, out = write_checkpoint(tmp_path / "model"), tmp_path / "new" / "e.pt2"
    flags = ["--checkpoint", checkpoint, "--views", 3, "--mask-ratio", 0.5, "--kind", "export", "--device", "cpu"]
    assert run("package", out, *flags) == 0
    assert "torch.export.load" in capsys.readouterr().out
    model = MaskedViT.from_pretrained(checkpoint)
    raw = raw_clips(model, 1)
    got = torch.export.load(out).module()(*inputs(raw))
    assert relative_error(got, model.ensemble(raw, 3, 0.5, seed=SEED, clip_ids=IDS[:1])) <= TOLERANCE
    assert run("package", out, *flags) == 2
    assert "--force writes over it" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gpu_package(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make(depth=2, embed_dim=128)
    raw = raw_clips(model)
    truth = model.double().ensemble(raw, 2, 0.75, seed=SEED, clip_ids=IDS)
    model = make(depth=2, embed_dim=128).to("cuda", dtype)
    allowed = 2 * relative_error(model.ensemble(raw.cuda(), 2, 0.75, seed=SEED, clip_ids=IDS).cpu(), truth) + TOLERANCE
    package = package_ensemble(model, tmp_path / "e.pt2", batch=4)
    (probs,) = run_alone("aoti", package, [inputs(raw.cuda())], tmp_path)
    assert relative_error(probs.cpu(), truth) <= allowed
