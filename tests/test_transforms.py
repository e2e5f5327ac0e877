"""Crops, flips and normalisation of a clip, and that every modality is cut at the same place."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmfast.data.heatmaps import hand_heatmaps
from mmfast.data.transforms import WHOLE, Augmentation, Crop, centre_crop, crop_flow, crop_resize, normalize


def _draws(count: int, augmentation: Augmentation, height: int, width: int) -> list[Crop]:
    return [augmentation.draw(torch.Generator().manual_seed(i)).crop(height, width) for i in range(count)]


def _ramp(height: int, width: int) -> Tensor:
    """float32 [2, 1, H, W]: every pixel tells its place, in fractions of the frame; x first."""
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    return torch.stack([x, y])[:, None]


def test_uint8_crop_equals_cutting_then_resizing() -> None:
    clip = torch.randint(0, 256, (3, 2, 30, 40), dtype=torch.uint8)
    crop = Crop(5 / 30, 10 / 40, 20 / 30, 25 / 40, flip=True)
    wanted = F.interpolate(clip[:, :, 5:25, 10:35].transpose(0, 1), (8, 9), mode="bilinear", antialias=True).flip(3)
    assert torch.equal(crop_resize(clip, crop, (8, 9)), wanted.transpose(0, 1))


def test_uint8_crop_takes_a_decoders_buffer_as_it_is() -> None:
    buffer = torch.randint(0, 256, (2, 31, 41, 3), dtype=torch.uint8)
    clip = buffer.permute(3, 0, 1, 2)
    crop = Crop(0.2, 0.1, 0.5, 0.7)
    assert torch.equal(crop_resize(clip, crop, (16, 16)), crop_resize(clip.contiguous(), crop, (16, 16)))


def test_uint8_crop_of_its_own_size_is_exact() -> None:
    clip = torch.randint(0, 256, (3, 2, 30, 40), dtype=torch.uint8)
    crop = Crop(4 / 30, 8 / 40, 16 / 30, 16 / 40)
    assert torch.equal(crop_resize(clip, crop, (16, 16)), clip[:, :, 4:20, 8:24])
    assert torch.equal(crop_resize(clip, crop), clip[:, :, 4:20, 8:24])


@pytest.mark.parametrize("size", [(7, 5), (28, 28), (40, 61)], ids=["smaller", "same", "larger"])
def test_float_maps_are_resized_as_by_torch(size: tuple[int, int]) -> None:
    clip = torch.randn(2, 3, 28, 28, dtype=torch.float64)
    wanted = F.interpolate(clip, size, mode="bilinear", antialias=True)
    torch.testing.assert_close(crop_resize(clip, WHOLE, size), wanted)


@pytest.mark.parametrize(("side", "tolerance"), [(24, 1e-6), (8, 1e-3)], ids=["enlarged", "reduced"])
def test_float_crop_lies_where_it_says_between_pixels(side: int, tolerance: float) -> None:
    """Bilinear weights keep a ramp exactly; the wider ones that merge pixels do to a twentieth of a pixel."""
    crop = Crop(0.23, 0.37, 0.41, 0.29)
    seen = crop_resize(_ramp(56, 56), crop, (side, side))[:, 0]
    middle = (torch.arange(side) + 0.5) / side
    assert float((seen[0] - (crop.left + crop.width * middle)).abs().max()) < tolerance
    assert float((seen[1] - (crop.top + crop.height * middle)[:, None]).abs().max()) < tolerance


def test_float_crop_mirrors() -> None:
    clip = torch.randn(21, 2, 14, 14)
    crop, mirrored = Crop(0.1, 0.2, 0.5, 0.6), Crop(0.1, 0.2, 0.5, 0.6, flip=True)
    torch.testing.assert_close(crop_resize(clip, mirrored, (14, 14)), crop_resize(clip, crop, (14, 14)).flip(3))


def test_a_hand_stays_under_its_heatmap() -> None:
    """The joint crop of 224 RGB and 56 heatmaps: the peak must be a quarter of where the bright dot is, +- 1 pixel."""
    for seed in range(20):
        crop = Augmentation(scale=(0.3, 1.0)).draw(torch.Generator().manual_seed(seed)).crop(224, 224)
        x, y = (round(224 * (start + 0.6 * part)) for start, part in ((crop.left, crop.width), (crop.top, crop.height)))
        rgb = torch.zeros(3, 1, 224, 224, dtype=torch.uint8)
        rgb[:, 0, y - 3 : y + 4, x - 3 : x + 4] = 255
        maps = hand_heatmaps(torch.tensor([[[[float(x), float(y)]] * 21]]), sigma=2.0)
        dot = crop_resize(rgb, crop, (224, 224))[0, 0].float()
        peak = crop_resize(maps, crop, (56, 56))[0, 0]
        centre = (dot / dot.sum() * _ramp(224, 224)[:, 0]).sum((1, 2)) * 56 - 0.5
        row, column = divmod(int(peak.argmax()), 56)
        assert abs(column - float(centre[0])) <= 1
        assert abs(row - float(centre[1])) <= 1


def test_flow_grows_with_the_zoom_and_turns_with_the_mirror() -> None:
    flow = torch.ones(2, 3, 28, 28)
    seen = crop_flow(flow, Crop(0.25, 0.0, 0.5, 0.25, flip=True), (28, 28))
    torch.testing.assert_close(seen[0], torch.full((3, 28, 28), -4.0))
    torch.testing.assert_close(seen[1], torch.full((3, 28, 28), 2.0))


def test_flow_of_a_cropped_clip_is_the_cropped_flow() -> None:
    """A picture that moves by (2, 1) pixels moves by the cropped flow after both are cropped and enlarged."""
    size, shift = 64, (2, 1)
    crop = Crop(0.25, 0.25, 0.5, 0.5, flip=True)
    y, x = torch.meshgrid(*[torch.arange(size, dtype=torch.float64)] * 2, indexing="ij")
    blob = [torch.exp(-((x - 30 - i * shift[0]) ** 2 + (y - 28 - i * shift[1]) ** 2) / 18) for i in range(2)]
    clip = crop_resize(torch.stack(blob)[None], crop, (size, size))[0]
    weights = clip / clip.sum((1, 2), keepdim=True)
    x_of, y_of = (weights * x).sum((1, 2)), (weights * y).sum((1, 2))
    flow = crop_flow(torch.tensor(shift, dtype=torch.float64).view(2, 1, 1, 1).expand(2, 1, size, size), crop)
    assert float(x_of[1] - x_of[0]) == pytest.approx(float(flow[0, 0, 9, 9]), abs=0.05)
    assert float(y_of[1] - y_of[0]) == pytest.approx(float(flow[1, 0, 9, 9]), abs=0.05)


def test_resizing_alone_keeps_the_flow() -> None:
    assert torch.equal(crop_flow(torch.ones(2, 1, 28, 28)), torch.ones(2, 1, 28, 28))
    torch.testing.assert_close(crop_flow(torch.ones(2, 1, 28, 28), WHOLE, (14, 14)), torch.ones(2, 1, 14, 14))


def test_random_crops_follow_scale_and_ratio() -> None:
    crops = _draws(400, Augmentation(scale=(0.2, 0.6)), 240, 320)
    areas = torch.tensor([c.height * c.width for c in crops])
    ratios = torch.tensor([c.width * 320 / (c.height * 240) for c in crops])
    assert 0.195 < float(areas.min()) < 0.25
    assert 0.55 < float(areas.max()) < 0.605
    assert abs(float(areas.mean()) - 0.4) < 0.02
    assert 0.74 < float(ratios.min()) < 0.8
    assert 1.25 < float(ratios.max()) < 1.35
    assert abs(float(ratios.log().mean())) < 0.03
    assert abs(sum(c.flip for c in crops) / 400 - 0.5) < 0.08


def test_random_crops_lie_anywhere_inside() -> None:
    crops = _draws(400, Augmentation(scale=(0.1, 0.1)), 100, 100)
    assert {round(c.left * 100) for c in crops} >= {0, 30, 60}
    assert min(c.top for c in crops) == 0
    assert max(c.top + c.height for c in crops) == pytest.approx(1)


@pytest.mark.parametrize(("height", "width"), [(10, 300), (300, 10), (1, 1)])
def test_no_crop_fits_takes_the_middle(height: int, width: int) -> None:
    crop = _draws(1, Augmentation(scale=(1.0, 1.0), ratio=(0.75, 4 / 3)), height, width)[0]
    h, w = crop.height * height, crop.width * width
    assert 0.7 <= w / h <= 1.4
    assert max(crop.height, crop.width) == 1
    assert abs(crop.left - (1 - crop.width) / 2) * width <= 0.5
    assert abs(crop.top - (1 - crop.height) / 2) * height <= 0.5


def test_a_draw_takes_equally_many_numbers_whatever_it_gives() -> None:
    after = []
    for augmentation in (Augmentation(), Augmentation(scale=(1.0, 1.0), flip=0.0)):
        generator = torch.Generator().manual_seed(3)
        augmentation.draw(generator).crop(10, 300)
        after.append(float(torch.rand((), generator=generator)))
    assert after[0] == after[1]


@pytest.mark.parametrize(("height", "width", "size"), [(48, 80, (32, 32)), (80, 48, (32, 32)), (50, 50, (20, 40))])
def test_centre_crop_has_the_shape_asked_for(height: int, width: int, size: tuple[int, int]) -> None:
    crop = centre_crop(height, width, size)
    assert crop.width * width / (crop.height * height) == pytest.approx(size[1] / size[0])
    assert max(crop.width, crop.height) == 1
    assert (crop.left, crop.top) == pytest.approx(((1 - crop.width) / 2, (1 - crop.height) / 2))


def test_normalize_leaves_its_input() -> None:
    clip = torch.full((2, 1, 3, 3), 5.0)
    seen = normalize(clip, (1.0, 3.0), (2.0, 4.0))
    assert torch.equal(seen[:, 0, 0, 0], torch.tensor([2.0, 0.5]))
    assert float(clip[0, 0, 0, 0]) == 5.0


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"scale": (0.5, 1.2)}, "scale"),
        ({"ratio": (2.0, 1.0)}, "ratio"),
        ({"ratio": (0.5, math.inf)}, "ratio"),
        ({"flip": 1.5}, "flip"),
    ],
)
def test_senseless_augmentation_is_refused(fields: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Augmentation(**fields)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="must lie in the frame"):
        Crop(0.5, 0.0, 0.6, 1.0)
    with pytest.raises(ValueError, match=r"clip must be \[C, F, H, W\]"):
        crop_resize(torch.zeros(3, 4, 5))
    with pytest.raises(TypeError, match="uint8 or floating point"):
        crop_resize(torch.zeros(3, 1, 4, 5, dtype=torch.int32))
    with pytest.raises(ValueError, match="flow must be"):
        crop_flow(torch.zeros(3, 1, 4, 4))
    with pytest.raises(ValueError, match="must have 2 values"):
        normalize(torch.zeros(2, 1, 4, 4), (0.0,), (1.0,))
