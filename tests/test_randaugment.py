"""RandAugment: what every operation does, what is drawn, and that a clip's frames share it."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmfast.data.dataset import ClipDataset
from mmfast.data.randaugment import Operation, RandAugment, operate
from mmfast.data.records import ClipRecord
from mmfast.data.transforms import Augmentation

pytest.importorskip("PIL.Image", reason="needs Pillow: pip install pillow")
NAMES = {
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast",
    "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY",
}  # fmt: skip


def clip(frames: int = 3, height: int = 20, width: int = 26, seed: int = 0) -> Tensor:
    """uint8 [3, F, H, W], a view of [F, H, W, 3]."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, height, width, 3), generator=draw, dtype=torch.uint8).permute(3, 0, 1, 2)


def done(pixels: Tensor, name: str, amount: float = 0.0) -> Tensor:
    return operate(pixels, [Operation(name, amount)])


def drawn(count: int = 4000, **settings: Any) -> list[Operation]:
    policy = RandAugment(**{"num_ops": 1, "probability": 1.0, **settings})
    return [policy.draw(torch.Generator().manual_seed(i))[0] for i in range(count)]


# -- what an operation does --------------------------------------------------------------------------------------------


def table(name: str, amount: float) -> Tensor:
    """What a value becomes, of those operations in which that depends on nothing else."""
    v = torch.arange(256)
    threshold, bits = int(amount), int(amount)
    found = {
        "Invert": 255 - v,
        "Posterize": v - v % 2 ** (8 - bits) if name == "Posterize" else v,
        "Solarize": torch.where(v < threshold, v, 255 - v),
        "SolarizeAdd": torch.where(v < 128, (v + threshold).clamp(max=255), v),
        "Brightness": (v * amount).clamp(max=255).to(torch.int64),
    }
    return found[name].to(torch.uint8)


@pytest.mark.parametrize(
    ("name", "amount"),
    [("Invert", 0), ("Posterize", 2), ("Posterize", 4), ("Solarize", 77), ("SolarizeAdd", 77), ("Brightness", 0.5)],
)
def test_values_go_by_a_table(name: str, amount: float) -> None:
    pixels = clip()
    assert torch.equal(done(pixels, name, amount), table(name, amount)[pixels.long()])


def test_auto_contrast_spreads_each_channel_of_each_frame() -> None:
    pixels = (clip().float() * torch.tensor([0.3, 0.5, 0.2]).view(3, 1, 1, 1) + 40).to(torch.uint8)
    low, high = pixels.amin((2, 3), keepdim=True).double(), pixels.amax((2, 3), keepdim=True).double()
    wanted = (pixels - low) * 255 / (high - low)
    assert float((done(pixels, "AutoContrast").double() - wanted).abs().max()) <= 1  # rounded down


def test_equalize_makes_every_value_as_frequent_as_another() -> None:
    dark = (clip(2, 64, 64).float() / 255).pow(2).mul(255).to(torch.uint8)
    seen = done(dark, "Equalize").float()
    for part in (0.25, 0.5, 0.75):
        assert float(seen.flatten(2).quantile(part, dim=2).sub(255 * part).abs().max()) < 20
    assert float(dark.float().flatten(2).median(2).values.max()) < 80


def test_equalize_and_contrast_are_of_each_frame_alone() -> None:
    pixels = torch.cat([clip(1, seed=1) // 4, clip(1, seed=2)], 1)
    for name, amount in (("Equalize", 0.0), ("Contrast", 0.4), ("AutoContrast", 0.0)):
        alone = torch.cat([done(pixels[:, i : i + 1], name, amount) for i in range(2)], 1)
        assert torch.equal(done(pixels, name, amount), alone), name


def test_colour_and_contrast_lead_away_from_grey() -> None:
    pixels = clip().double()
    grey = (pixels * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1, 1)).sum(0, keepdim=True)
    for name, middle in (("Color", grey), ("Contrast", grey.mean((2, 3), keepdim=True))):
        for amount in (0.37, 1.63):
            wanted = (middle + amount * (pixels - middle)).clamp(0, 255)
            assert float((done(pixels.to(torch.uint8), name, amount).double() - wanted).abs().max()) <= 2, name


def test_sharpness_leads_away_from_the_smoothed_frame() -> None:
    pixels = clip().double()
    kernel = torch.ones(3, 3, dtype=torch.float64)
    kernel[1, 1] = 5
    frames = pixels.transpose(0, 1)
    inner = torch.nn.functional.conv2d(frames, (kernel / 13).expand(3, 1, 3, 3), groups=3).transpose(0, 1)
    own = pixels[:, :, 1:-1, 1:-1]
    wanted = (inner + 1.5 * (own - inner)).clamp(0, 255)
    seen = done(pixels.to(torch.uint8), "Sharpness", 1.5)[:, :, 1:-1, 1:-1]
    assert float((seen.double() - wanted).abs().max()) <= 1.5


@pytest.mark.parametrize(("name", "dim"), [("TranslateX", 3), ("TranslateY", 2)])
def test_a_translation_of_whole_pixels_moves_and_leaves_grey(name: str, dim: int) -> None:
    pixels = clip(height=20, width=20)
    seen = done(pixels, name, 0.25)
    assert torch.equal(seen.narrow(dim, 0, 15), pixels.narrow(dim, 5, 15))
    assert bool((seen.narrow(dim, 15, 5) == 128).all())


@pytest.mark.parametrize(("name", "across"), [("ShearX", 3), ("ShearY", 2)])
def test_a_shear_moves_each_line_by_its_place(name: str, across: int) -> None:
    """A ramp tells where a pixel is from."""
    ramp = (2 * torch.arange(60)).to(torch.uint8).expand(3, 1, 20, 60)
    seen = done(ramp if across == 3 else ramp.transpose(2, 3), name, 0.3)
    rows = (seen if across == 3 else seen.transpose(2, 3)).double() / 2
    wanted = torch.arange(60) + 0.3 * (torch.arange(20)[:, None] + 0.5)
    assert float((rows - wanted)[..., 2:50].abs().max()) < 0.5


def test_a_rotation_turns_against_the_clock() -> None:
    pixels = clip(2, 21, 21)
    assert torch.equal(done(pixels, "Rotate", 90.0), pixels.rot90(1, (2, 3)))


# -- what is drawn -----------------------------------------------------------------------------------------------------


def test_every_operation_is_drawn_as_often() -> None:
    names = [name for name, _ in drawn()]
    assert set(names) == NAMES
    counts = np.array([names.count(name) for name in NAMES])
    assert np.abs(counts - 4000 / 15).max() < 5 * math.sqrt(4000 / 15)


def test_amounts_at_magnitude_seven() -> None:
    found: dict[str, set[float]] = {}
    for name, amount in drawn(std=0.0):
        found.setdefault(name, set()).add(round(amount, 6))
    assert found["Rotate"] == {21.0, -21.0}
    assert found["ShearX"] == found["ShearY"] == {0.21, -0.21}
    assert found["TranslateX"] == found["TranslateY"] == {0.315, -0.315}
    assert found["Posterize"] == {2.0}
    assert found["Solarize"] == {77.0}
    assert found["SolarizeAdd"] == {77.0}
    assert found["Color"] == found["Contrast"] == found["Brightness"] == found["Sharpness"] == {1.63, 0.37}
    assert found["AutoContrast"] == found["Equalize"] == found["Invert"] == {0.0}


def test_levels_vary_by_std_and_end_at_ten() -> None:
    turned = [abs(amount) / 3 for name, amount in drawn(magnitude=7, std=0.5) if name == "Rotate"]
    assert np.mean(turned) == pytest.approx(7, abs=0.2)
    assert np.std(turned) == pytest.approx(0.5, abs=0.1)
    far = [abs(amount) / 3 for name, amount in drawn(magnitude=9.5, std=4.0) if name == "Rotate"]
    assert max(far) == pytest.approx(10)
    assert min(far) >= 0


def test_an_operation_is_done_half_of_the_time() -> None:
    policy = RandAugment.parse("rand-m7-n4-mstd0.5-inc1")
    counts = [len(policy.draw(torch.Generator().manual_seed(i))) for i in range(2000)]
    assert np.mean(counts) == pytest.approx(2, abs=0.1)
    assert (min(counts), max(counts)) == (0, 4)


def test_the_generator_decides_and_moves_on_alike() -> None:
    policy = RandAugment()
    ends = []
    for seed in (3, 3, 4):
        draw = torch.Generator().manual_seed(seed)
        ends.append((policy.draw(draw), policy.draw(draw)))
    assert ends[0] == ends[1]
    assert ends[0] != ends[2]
    assert ends[0][0] != ends[0][1]


def test_text_tells_the_policy() -> None:
    assert RandAugment.parse("rand-m7-n4-mstd0.5-inc1") == RandAugment(7, 4, 0.5, 0.5)
    assert RandAugment.parse("rand-m9-n2-p0.8-inc1") == RandAugment(9, 2, 0.0, 0.8)


# -- a clip ------------------------------------------------------------------------------------------------------------


def test_frames_alike_stay_alike() -> None:
    still = clip(1).expand(-1, 5, -1, -1)
    for seed in range(20):
        seen = operate(still, RandAugment().draw(torch.Generator().manual_seed(seed)))
        assert torch.equal(seen, seen[:, :1].expand_as(seen))


def test_operations_come_one_after_another() -> None:
    pixels = clip()
    first, second = Operation("Invert", 0.0), Operation("Posterize", 2.0)
    assert torch.equal(operate(pixels, [first, second]), done(done(pixels, *first), *second))
    assert not torch.equal(operate(pixels, [first, second]), operate(pixels, [second, first]))


def test_strides_do_not_matter() -> None:
    pixels = clip()
    ops = [Operation("Rotate", 13.0), Operation("Color", 0.4)]
    assert torch.equal(operate(pixels, ops), operate(pixels.contiguous(), ops))
    assert operate(pixels, ops).permute(1, 2, 3, 0).is_contiguous()


def test_nothing_drawn_copies_nothing() -> None:
    pixels = clip()
    assert operate(pixels, ()) is pixels


def picture_records(folder: Any) -> list[ClipRecord]:
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (24, 30, 3), dtype=np.uint8)).save(folder / f"{i:03}.png")
    return [ClipRecord(0, "clip", {"rgb": f"{folder}/{{:03d}}.png", "flow": "x"}, 0, 4, 1)]


def test_a_data_set_augments_crops_of_training_alone(tmp_path: Any) -> None:
    records = picture_records(tmp_path)
    own: dict[str, Any] = dict(num_frames=3, stride=1, size=16)
    policy = "rand-m9-n8-mstd0.5-p1-inc1"
    plain, strong = (
        ClipDataset(records, train=True, seed=5, augment=Augmentation(randaugment=r), **own) for r in (None, policy)
    )
    assert not torch.equal(strong[0]["rgb"], plain[0]["rgb"])
    assert torch.equal(strong[0]["rgb"], strong[0]["rgb"])
    draw = strong.augment.draw  # type: ignore[union-attr]
    ops = [draw(torch.Generator().manual_seed(i)).operations for i in range(3)]
    assert all(len(o) == 8 for o in ops)
    assert torch.equal(strong.load(records[0])["rgb"], plain.load(records[0])["rgb"])


def test_a_crop_is_the_same_with_and_without() -> None:
    draws = [Augmentation(randaugment=r).draw(torch.Generator().manual_seed(7)) for r in (None, "rand-m7-n4-inc1")]
    assert draws[0].crop(30, 40) == draws[1].crop(30, 40)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["rand-m7-n4", "rand-m7-n4-mstd0.5-inc0", "m7-n4-inc1", "rand-m7-n4-w0-inc1", ""])
def test_another_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="randaugment must have the form rand-m7-n4-mstd0.5-inc1"):
        Augmentation(randaugment=text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(magnitude=11), r"magnitude must lie in 0..10, got 11"),
        (dict(num_ops=0), "num_ops must be at least 1, got 0"),
        (dict(std=-1), "std must be finite and at least 0, got -1"),
        (dict(probability=1.5), r"probability must lie in 0..1, got 1.5"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_numbers_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandAugment(**settings)


def test_other_pixels_are_refused() -> None:
    ops = [Operation("Invert", 0.0)]
    with pytest.raises(ValueError, match=r"clip must be \[3, F, H, W\], got \(2, 3, 20, 26\)"):
        operate(clip()[:2], ops)
    with pytest.raises(TypeError, match="clip must be uint8, got torch.float32"):
        operate(clip().float(), ops)


def test_other_modalities_are_refused(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="randaugment, which is of rgb alone: it would move rgb off rgb, flow"):
        ClipDataset(picture_records(tmp_path), ("rgb", "flow"), augment=Augmentation(randaugment="rand-m7-n4-inc1"))


def test_without_pillow_it_is_said(monkeypatch: Any) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match="RandAugment needs Pillow"):
        operate(clip(), [Operation("Invert", 0.0)])
