"""Packages of adapted models, EVL, M2-CLIP and zero-shot CLIP: the models' own numbers where there is no mmfast."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import adapter_makers
import clip_makers
import evl_makers
import m2clip_makers
import pytest
import torch
from command_runs import run, write_checkpoint
from fit_clip_makers import COLOURS, write_clip_model, write_labels, write_vocabulary
from numerics import relative_error
from test_package import IDS, SEED, TOLERANCE, inputs, run_alone
from torch import Tensor
from torch.nn import functional as F

from mmfast import CLIP, tube_masks
from mmfast.data.captions import class_prompts
from mmfast.data.tokenizer import ClipTokenizer
from mmfast.evl_ensemble import EVLEnsemble
from mmfast.multiview import text_features, text_scale
from mmfast.package import package_ensemble, package_zero_shot
from mmfast.programs import Program, TextProgram, program_of

TEXTS = [3, 5, 2, 4, 6, 1]


@dataclass(frozen=True)
class Case:
    """A kind of model: how it is made, a program of it, a package of it, and its own probabilities."""

    make: Callable[[], Any]
    program: Callable[[Any, int, float], Program]
    package: Callable[..., Path]
    truth: Callable[[Any, Tensor, int, float], Tensor]


def masks(video: Tensor, grid: tuple[int, int, int], views: int, ratio: float) -> Tensor:
    return tube_masks(len(video), views, grid, ratio, seed=SEED, clip_ids=IDS[: len(video)], device=video.device)


def own_program(model: Any, views: int, ratio: float) -> Program:
    return program_of(model, views, ratio, None)


def by_ensemble(model: Any, video: Tensor, views: int, ratio: float) -> Tensor:
    own = model if hasattr(model, "ensemble") else EVLEnsemble(model)
    return own.ensemble(video, views, ratio, seed=SEED, clip_ids=IDS[: len(video)])


def by_class_head(model: Any, video: Tensor, views: int, ratio: float) -> Tensor:
    mask = masks(video, (video.shape[2], 4, 4), views, ratio)
    return model(video, mask).float().softmax(-1).mean(1)


def text_program(model: Any, tokens: Tensor, frames: int, views: int, ratio: float) -> Program:
    return TextProgram(model, text_features(model, tokens), text_scale(model), frames, views, ratio, None)


def by_texts(model: Any, video: Tensor, views: int, ratio: float) -> Tensor:
    features = model.encode_video(video, masks(video, (3, 4, 4), views, ratio)).features
    return model.class_scores(features.float(), m2clip_makers.texts(TEXTS)).softmax(-1).mean(1)


def prompts() -> Tensor:
    """Two a class, [2, K, context]."""
    return torch.stack([clip_makers.texts(seed=seed) for seed in (2, 3)])


def by_clip(model: Any, video: Tensor, views: int, ratio: float) -> Tensor:
    """By CLIP's own recipe: unit features of frames' mean and of the mean of unit prompts, the temperature, softmax."""
    texts = F.normalize(torch.stack([F.normalize(model.encode_text(ids), dim=-1) for ids in prompts()]).mean(0), dim=-1)
    features = model.encode_image(video, masks(video, (4, 3, 3), views, ratio)).mean(-2)
    return (model.logit_scale.exp() * F.normalize(features, dim=-1) @ texts.t()).softmax(-1).mean(1)


def adapted(*before: str) -> Case:
    return Case(lambda: adapter_makers.make(adapter_before=before), own_program, package_ensemble, by_ensemble)


def m2clip(preset: str, **changes: Any) -> tuple[Case, Case]:
    """By its classes, and by texts."""
    make = lambda: m2clip_makers.tiny_model(preset, **changes)
    tokens = m2clip_makers.texts(TEXTS)
    return (
        Case(make, own_program, package_ensemble, by_class_head),
        Case(
            make,
            lambda model, views, ratio: text_program(model, tokens, 3, views, ratio),
            lambda model, path, **options: package_zero_shot(model, path, tokens, **options),
            by_texts,
        ),
    )


CASES: dict[str, Case] = {
    "vit, adapters before attention": adapted("attn"),
    "vit, adapters before the mlp": adapted("mlp"),
    "vit, adapters before both": adapted("attn", "mlp"),
    "evl on a clip": Case(lambda: evl_makers.tiny_model("clip"), own_program, package_ensemble, by_ensemble),
    "evl on a vit": Case(lambda: evl_makers.tiny_model("vit"), own_program, package_ensemble, by_ensemble),
    "evl without temporal modules": Case(
        lambda: evl_makers.tiny_model(
            "clip", temporal_conv=False, temporal_positions=False, temporal_cross_attention=False
        ),
        own_program,
        package_ensemble,
        by_ensemble,
    ),
    **{
        f"m2clip {preset}, by {by}": case
        for preset in ("k400", "ssv2", "paper")
        for by, case in zip(("classes", "texts"), m2clip(preset), strict=True)
    },
    "clip by texts": Case(
        clip_makers.make,
        lambda model, views, ratio: text_program(model, prompts(), 4, views, ratio),
        lambda model, path, **options: package_zero_shot(model, path, prompts(), num_frames=4, **options),
        by_clip,
    ),
}
VIEWS = {"masked": (2, 0.5), "whole": (1, 0.0)}
# Compiled, which takes long: of each kind one, of which every op that it has is in.
COMPILED = ["vit, adapters before both", "evl on a clip", "m2clip k400, by texts"]


def clips_of(program: Program, raw: bool = True, batch: int = 3) -> Tensor:
    draw = torch.Generator().manual_seed(batch)
    shape = (batch, *program.shape)
    return (
        torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw) if raw else torch.randn(shape, generator=draw)
    )


@pytest.mark.parametrize("raw", [True, False], ids=["uint8", "normalised"])
@pytest.mark.parametrize("views", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@torch.no_grad()
def test_the_program_is_the_model(case: Case, views: tuple[int, float], raw: bool) -> None:
    model = case.make()
    program = case.program(model, *views)
    video = clips_of(program, raw)
    assert relative_error(program(*inputs(video)), case.truth(model, video, *views)) <= TOLERANCE


@torch.no_grad()
def check_alone(name: str, kind: str, views: tuple[int, float], folder: Path) -> None:
    case, batch = CASES[name], 4
    model = case.make()
    settings: dict[str, Any] = dict(zip(("views", "mask_ratio"), views, strict=True))
    package = case.package(model, folder / "p.pt2", batch=batch, kind=kind, **settings)
    raw = clips_of(case.program(model, *views))
    batches = [raw, raw[:1].clone()]
    got = run_alone(kind, package, [inputs(b) for b in batches], folder)
    for video, probs in zip(batches, got, strict=True):
        assert relative_error(probs, case.truth(model, video, *views)) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "views"),
    [
        *((name, "masked") for name in (*COMPILED, "evl on a vit", "m2clip ssv2, by classes")),
        *((name, "whole") for name in ("evl on a clip", "clip by texts")),
    ],
)
def test_an_exported_graph_runs_where_there_is_no_mmfast(name: str, views: str, tmp_path: Path) -> None:
    check_alone(name, "export", VIEWS[views], tmp_path)


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_package_runs_where_there_is_no_mmfast(name: str, tmp_path: Path) -> None:
    check_alone(name, "aoti", VIEWS["masked"], tmp_path)


def test_the_text_tower_is_left_out(tmp_path: Path) -> None:
    """Beside the vision tower's weights there is room for the texts' features, and for no text tower."""
    model = clip_makers.make(text_width=256, text_depth=4)
    path = package_zero_shot(model, tmp_path / "z.pt2", clip_makers.texts(), num_frames=4, kind="export")
    stored = sum(t.numel() for t in torch.export.load(path).state_dict.values())
    stored += sum(t.numel() for t in torch.export.load(path).constants.values() if isinstance(t, Tensor))
    assert stored < 1.3 * sum(p.numel() for p in model.visual.parameters())


@torch.no_grad()
def test_adapters_that_are_switched_off_take_no_part() -> None:
    model = adapter_makers.make()
    video = adapter_makers.clips(3)
    with_adapters = model.ensemble(video, 2, 0.5, seed=SEED, clip_ids=IDS)
    model.enable_adapters(False)
    found = program_of(model, 2, 0.5, None)(*inputs(video))
    assert relative_error(found, model.ensemble(video, 2, 0.5, seed=SEED, clip_ids=IDS)) <= TOLERANCE
    assert relative_error(found, with_adapters) > 1e-3


@torch.no_grad()
def test_vision_adapters_of_an_m2clip_that_are_switched_off_take_no_part() -> None:
    case = CASES["m2clip ssv2, by texts"]
    model = case.make()
    model.enable_adapters(vision=False)
    program = case.program(model, 1, 0.0)
    video = clips_of(program, raw=False)
    assert relative_error(program(*inputs(video)), case.truth(model, video, 1, 0.0)) <= TOLERANCE


@pytest.mark.parametrize("name", ["evl on a clip", "m2clip k400, by texts", "vit, adapters before both"])
@torch.no_grad()
def test_half_precision_errs_no_more_than_twice_as_much(name: str) -> None:
    case = CASES[name]
    model = case.make()
    program = case.program(model, 2, 0.5)
    video = clips_of(program, raw=False)
    truth = case.truth(model.double(), video.double(), 2, 0.5)
    model = case.make().bfloat16()
    allowed = 2 * relative_error(case.truth(model, video.bfloat16(), 2, 0.5), truth)
    assert relative_error(case.program(model, 2, 0.5)(*inputs(video.bfloat16())), truth) <= allowed


def test_names_of_classes_are_kept_with_the_program(tmp_path: Path) -> None:
    extra = {"mmfast": ""}
    names = ["ein Tanz", "é", "c", "d", "e"]
    model = evl_makers.tiny_model("clip")
    torch.export.load(package_ensemble(model, tmp_path / "e.pt2", kind="export", classes=names), extra_files=extra)
    about = json.loads(extra["mmfast"])
    assert about["classes"] == names
    assert (about["model"], about["clip"], about["pixels"]) == ("EVL", [3, 4, 24, 24], "torch.uint8")


def compiler_of(errors: list[float], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """In place of Inductor: the programs it makes are off by these relative errors, one after another. Its options."""
    asked: list[dict[str, Any]] = []
    program: list[Any] = []

    def write(exported: Any, package_path: str, inductor_configs: dict[str, Any]) -> str:
        asked.append(inductor_configs)
        program[:] = [exported.module()]
        Path(package_path).write_text("compiled")
        return package_path

    def read(path: str) -> Callable[..., Tensor]:
        return lambda *given: program[0](*given) * (1 + errors[len(asked) - 1])

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", write)
    monkeypatch.setattr(torch._inductor, "aoti_load_package", read)
    return asked


def test_a_right_program_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = compiler_of([0.0], monkeypatch)
    package_ensemble(evl_makers.tiny_model("clip"), tmp_path / "p.pt2", options={"a": 1})
    assert [options["a"] for options in asked] == [1]
    assert asked[0]["freezing"] is True


def test_a_program_that_torch_compiled_wrongly_is_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = compiler_of([0.01, 0.0], monkeypatch)
    with pytest.warns(UserWarning, match="again without vector code"):
        package_ensemble(evl_makers.tiny_model("clip"), tmp_path / "p.pt2", batch=2)
    assert [options.get("cpp.simdlen") for options in asked] == [None, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["p.pt2"]


@pytest.mark.parametrize("error", [0.01, float("nan")])
def test_a_wrong_package_is_never_written(error: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler_of([error, error], monkeypatch)
    with (
        pytest.warns(UserWarning, match="compiled wrongly"),
        pytest.raises(RuntimeError, match='kind="export" needs no compiler'),
    ):
        package_ensemble(evl_makers.tiny_model("clip"), tmp_path / "p.pt2")
    assert not list(tmp_path.iterdir())


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def clip_files(tmp_path: Path) -> Path:
    """A CLIP, its vocabulary, and names of classes."""
    write_clip_model(tmp_path / "model")
    write_vocabulary(tmp_path)
    write_labels(tmp_path / "labels.csv")
    return tmp_path


def test_the_command_packages_a_clip_and_texts(clip_files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, labels, words = (clip_files / name for name in ("z.pt2", "labels.csv", "merges.txt"))
    texts = ["--labels", labels, "--vocabulary", words, "--prompt", "a {}", "--prompt", "the {} clip"]
    size = ["--num-frames", 3, "--batch", 2, "--kind", "export", "--device", "cpu", "--normalised"]
    assert run("package", out, "--checkpoint", clip_files / "model", "--zero-shot", *texts, *size) == 0
    assert "torch.export.load" in capsys.readouterr().out
    extra = {"mmfast": ""}
    program = torch.export.load(out, extra_files=extra).module()
    assert json.loads(extra["mmfast"])["classes"] == list(COLOURS)
    model = CLIP.from_pretrained(clip_files / "model")
    video = torch.randn(2, 3, 3, *(2 * [model.config.image_size]))
    ids = class_prompts(ClipTokenizer.load(words), list(COLOURS), ["a {}", "the {} clip"])
    with torch.no_grad():
        own = F.normalize(model.encode_image(video).mean(1), dim=-1) @ text_features(model, ids).t()
        expected = (model.logit_scale.exp() * own).softmax(-1)
        assert relative_error(program(*inputs(video)), expected) <= TOLERANCE


def test_the_command_packages_an_evl_with_the_names_beside_it(tmp_path: Path) -> None:
    model = evl_makers.tiny_model("clip")
    model.save_pretrained(tmp_path / "evl")
    write_labels(tmp_path / "evl" / "labels.csv", list("abcde"))
    out = tmp_path / "e.pt2"
    flags = ["--views", 1, "--mask-ratio", 0, "--kind", "export", "--device", "cpu"]
    assert run("package", out, "--checkpoint", tmp_path / "evl", *flags) == 0
    extra = {"mmfast": ""}
    program = torch.export.load(out, extra_files=extra).module()
    assert json.loads(extra["mmfast"])["classes"] == list("abcde")
    raw = torch.randint(0, 256, (1, 3, 4, 24, 24), dtype=torch.uint8)
    with torch.no_grad():
        assert relative_error(program(*inputs(raw)), model(raw).softmax(-1)) <= TOLERANCE


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "a CLIP has no classes of its own"),
        (["--zero-shot"], "--zero-shot needs --labels"),
        (["--precision", "int8"], "--precision int8 is of a masked ViT, got CLIP"),
    ],
    ids=["no classes", "no names", "int8"],
)
def test_what_the_command_cannot_package(
    flags: list[str], message: str, clip_files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = clip_files / "p.pt2"
    assert run("package", out, "--checkpoint", clip_files / "model", "--device", "cpu", *flags) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_masked_vit_knows_no_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, names = write_checkpoint(tmp_path / "model"), write_labels(tmp_path / "labels.csv")
    given = ["--checkpoint", checkpoint, "--zero-shot", "--labels", names, "--device", "cpu"]
    assert run("package", tmp_path / "p.pt2", *given) == 2
    assert "needs a model that knows texts" in capsys.readouterr().err


# -- errors ------------------------------------------------------------------------------------------------------------


def test_a_clip_has_no_classes_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="package_zero_shot"):
        package_ensemble(clip_makers.make(), tmp_path / "p.pt2")  # type: ignore[arg-type]


def test_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="takes a MaskedViT, an EVL or an M2CLIP, got Linear"):
        package_ensemble(torch.nn.Linear(2, 2), tmp_path / "p.pt2")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="takes a CLIP or an M2CLIP, got MaskedViT"):
        package_zero_shot(adapter_makers.make(), tmp_path / "p.pt2", clip_makers.texts())  # type: ignore[arg-type]


def test_a_quantised_backbone_is_refused(tmp_path: Path) -> None:
    model = evl_makers.tiny_model("vit")
    model.backbone.quantize_int8()
    with pytest.raises(ValueError, match="the model is in int8; call dequantize"):
        package_ensemble(model, tmp_path / "p.pt2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_frames=5), "num_frames takes 3, the frames of this model's adapters, got 5"),
        (dict(class_token_ids=torch.zeros(3)), r"class_token_ids takes integers \[K, context\]"),
        (dict(classes=["a"]), "classes takes 6 names, one a class, got 1"),
        (dict(classes="abcdef"), "classes takes 6 names, one a class, got 'abcdef'"),
        (dict(mask_ratio=1.0), "mask_ratio must lie in"),
        (dict(kind="onnx"), "kind takes one of"),
    ],
    ids=lambda x: str(x)[:24],
)
def test_what_does_not_fit_is_named(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = {"class_token_ids": m2clip_makers.texts(TEXTS), **options}
    with pytest.raises(ValueError, match=message):
        package_zero_shot(m2clip_makers.tiny_model(), tmp_path / "p.pt2", **given)
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", COMPILED)
@torch.no_grad()
def test_gpu_package(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    case = CASES[name]
    model = case.make()
    raw = clips_of(case.program(model, 2, 0.5))
    truth = case.truth(model.double(), raw, 2, 0.5)
    model = case.make().to("cuda", dtype)
    own = case.truth(model, raw.cuda(), 2, 0.5).cpu()
    package = case.package(model, tmp_path / "p.pt2", batch=4, views=2, mask_ratio=0.5)
    (probs,) = run_alone("aoti", package, [inputs(raw.cuda())], tmp_path)
    assert relative_error(probs.cpu(), truth) <= 2 * relative_error(own, truth) + TOLERANCE
