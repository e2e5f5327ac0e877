"""ClipDataset: which frames, the same cut for every modality, what is refused."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from frame_files import ALL, array_frame, same_items, scene, write_frame, write_record

from mmfast.config import ViTConfig
from mmfast.data.dataset import ClipDataset
from mmfast.data.frames import ClipError
from mmfast.data.records import ClipRecord
from mmfast.data.transforms import Augmentation, Crop, centre_crop, crop_flow, crop_resize, normalize
from mmfast.data.video import resize_frames


def _shown(item: dict[str, Any], numbers: Sequence[int] = range(1, 40), clip: int = 0) -> list[int]:
    """Numbers of the frames that an item of `size` (48, 80), the stored one, shows."""
    known = {scene(n, clip).tobytes(): n for n in numbers}
    return [known[item["rgb"][:, i].permute(1, 2, 0).numpy().tobytes()] for i in range(item["rgb"].shape[1])]


# -- sampling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "stop", "options", "wanted"),
    [
        (3, None, {"stride": 2}, [3, 5, 7]),
        (3, 20, {"stride": 2}, [3, 5, 7]),
        (3, 6, {"stride": 2}, [3, 5, 5]),
        (3, 6, {"stride": 2, "clamp": False}, [3, 5, 7]),
        (3, 20, {"stride": 2, "position": "centre"}, [9, 11, 13]),
        (3, None, {"stride": 2, "position": "centre"}, [3, 5, 7]),
        (3, 6, {"stride": 2, "position": "centre"}, [3, 5, 5]),
        (0, None, {"stride": 1}, [1, 2, 3]),
        (3, 12, {"stride": None}, [4, 7, 10]),
        (0, None, {"stride": None}, [6, 16, 26]),
        (13, None, {"stride": None}, [16, 22, 28]),
    ],
)
def test_which_frames_are_shown(
    tmp_path: Path, start: int, stop: int | None, options: dict[str, Any], wanted: list[int]
) -> None:
    record = write_record(tmp_path, numbers=range(1, 31), start=start, stop=stop)
    dataset = ClipDataset([record], num_frames=3, size=(48, 80), **options)
    assert _shown(dataset[0]) == wanted
    assert _shown(dataset.load(record)) == wanted


def test_a_random_start_stays_inside_the_clip(tmp_path: Path) -> None:
    record = write_record(tmp_path, numbers=range(1, 31), start=5, stop=14)
    dataset = ClipDataset([record], num_frames=3, stride=2, size=(48, 80), train=True, augment="none")
    starts = set()
    for epoch in range(60):
        dataset.set_epoch(epoch)
        shown = _shown(dataset[0])
        assert shown == [shown[0], shown[0] + 2, shown[0] + 4]
        starts.add(shown[0])
    assert starts == {5, 6, 7, 8, 9}


def test_a_clip_without_a_stop_starts_where_it_says_in_training(tmp_path: Path) -> None:
    """WEAR and Ego4D say the start only: frames further on belong to another action."""
    record = write_record(tmp_path, numbers=range(1, 31), start=5, stop=None)
    dataset = ClipDataset([record], num_frames=3, stride=2, size=(48, 80), train=True, augment="none")
    for epoch in range(5):
        dataset.set_epoch(epoch)
        assert _shown(dataset[0]) == [5, 7, 9]


def test_a_whole_video_is_sampled_anywhere_in_training(tmp_path: Path) -> None:
    pytest.importorskip("av")
    from video_files import decode_all, write_clip

    path = write_clip(tmp_path / "clip.mp4", 20)
    frames = torch.from_numpy(decode_all(path))
    dataset = ClipDataset(
        [ClipRecord(0, "a", {"rgb": path})], num_frames=2, stride=4, size=(48, 80), train=True, augment="none"
    )
    starts = set()
    for epoch in range(40):
        dataset.set_epoch(epoch)
        clip = dataset[0]["rgb"].permute(1, 2, 3, 0)
        start = next(i for i in range(20) if torch.equal(frames[i], clip[0]))
        assert torch.equal(clip[1], frames[start + 4])
        starts.add(start)
    assert min(starts) <= 1
    assert max(starts) >= 14


def test_the_modality_that_ends_first_ends_the_clip(tmp_path: Path) -> None:
    """Flow has one frame less than RGB: both stop there, so that they stay together."""
    for number in range(1, 7):
        write_frame(tmp_path / "rgb" / f"{number}.png", "rgb", number)
    for number in range(2, 6):
        write_frame(tmp_path / "flow" / f"{number}.npy", "flow", number)
    record = ClipRecord(0, "a", {"rgb": tmp_path / "rgb", "flow": tmp_path / "flow"})
    dataset = ClipDataset([record], ("rgb", "flow"), num_frames=3, stride=2, size=(48, 80))
    assert _shown(dataset[0]) == [2, 4, 5]
    assert dataset.faults.clamped_frames == 1


def test_a_clip_past_its_video_is_broken(tmp_path: Path) -> None:
    write_frame(tmp_path / "1.png", "rgb", 1)
    dataset = ClipDataset([ClipRecord(0, "a", {"rgb": tmp_path}, 7, 9)], num_frames=2)
    with pytest.raises(ClipError, match="a: rgb: starts at frame 7, its source ends at frame 1"):
        dataset.load(dataset.records[0])


# -- pixels ------------------------------------------------------------------------------------------------------------


def test_evaluation_squashes_and_normalises(tmp_path: Path) -> None:
    record = write_record(tmp_path, 5, ALL, label=3)
    item = ClipDataset([record], ALL, num_frames=2, stride=1, size=28)[0]
    wanted = resize_frames(torch.from_numpy(np.stack([scene(n, 5) for n in (1, 2)])), (28, 28))
    assert torch.equal(item["rgb"], wanted.permute(3, 0, 1, 2))
    flow = torch.from_numpy(array_frame("flow", 2, 5)).permute(2, 0, 1)
    torch.testing.assert_close(item["flow"][0, 1], (flow[0] - 0.0507) / 10.9280)
    torch.testing.assert_close(item["flow"][1, 1], (flow[1] - 0.4671) / 8.6857)
    stored = torch.from_numpy(array_frame("pose", 2, 5)).permute(2, 0, 1)
    small = torch.nn.functional.interpolate(stored[None], (7, 7), mode="bilinear", antialias=True)[0]
    torch.testing.assert_close(item["pose"][:, 1], (small - 0.3) / 0.3)
    assert (item["clip_id"], item["label"], item["broken"]) == (5, 3, 0)


def test_evaluation_crop_is_the_same_for_every_modality(tmp_path: Path) -> None:
    record = write_record(tmp_path, 0, ALL)
    item = ClipDataset([record], ALL, num_frames=1, size=28, resize="crop")[0]
    wanted = resize_frames(torch.from_numpy(scene(1))[None], (28, 28), "crop").permute(3, 0, 1, 2)
    assert torch.equal(item["rgb"], wanted)
    crop = centre_crop(48, 80, (28, 28))
    stored = torch.from_numpy(array_frame("flow", 1)).permute(2, 0, 1)[:, None]
    flow = ViTConfig(in_chans=2)
    torch.testing.assert_close(item["flow"], normalize(crop_flow(stored, crop, (28, 28)), flow.mean, flow.std))


def _drawn(seed: int, epoch: int, clip_id: int, augmentation: Augmentation) -> Crop:
    state = np.random.SeedSequence([seed, epoch, clip_id]).generate_state(1, np.uint64)
    return augmentation.draw(torch.Generator().manual_seed(int(state[0]) >> 1)).crop(48, 80)


def test_joint_training_cuts_every_modality_alike(tmp_path: Path) -> None:
    """No stop, so the first numbers drawn are the crop's."""
    record = write_record(tmp_path, 3, ALL, stop=None)
    dataset = ClipDataset([record], ALL, num_frames=2, stride=1, size=28, train=True, seed=9)
    flips = set()
    for epoch in range(6):
        dataset.set_epoch(epoch)
        item, crop = dataset[0], _drawn(9, epoch, 3, Augmentation())
        flips.add(crop.flip)
        frames = torch.from_numpy(np.stack([scene(n, 3) for n in (1, 2)])).permute(3, 0, 1, 2)
        assert torch.equal(item["rgb"], crop_resize(frames, crop, (28, 28)))
        for modality, side, cut in (("flow", 28, crop_flow), ("pose", 7, crop_resize)):
            maps = torch.from_numpy(np.stack([array_frame(modality, n, 3) for n in (1, 2)])).permute(3, 0, 1, 2)
            published = ViTConfig(in_chans=len(maps))
            wanted = normalize(cut(maps, crop, (side, side)), published.mean, published.std)
            torch.testing.assert_close(item[modality], wanted)
    assert flips == {True, False}


def test_the_order_of_modalities_changes_nothing(tmp_path: Path) -> None:
    """Flow is stored square, RGB is not: the crop must be drawn in RGB's shape even where flow is named first."""
    record = write_record(tmp_path, 3, ALL)
    a, b = (ClipDataset([record], names, num_frames=2, size=28, train=True)[0] for names in (ALL, ALL[::-1]))
    assert same_items(a, b)


def test_reference_training_cuts_rgb_alone(tmp_path: Path) -> None:
    record = write_record(tmp_path, 3, ALL, stop=None)
    trained = ClipDataset([record], ALL, num_frames=2, stride=1, size=28, train=True, augment="reference", seed=9)[0]
    whole = ClipDataset([record], ALL, num_frames=2, stride=1, size=28)[0]
    assert torch.equal(trained["flow"], whole["flow"])
    assert torch.equal(trained["pose"], whole["pose"])
    frames = torch.from_numpy(np.stack([scene(n, 3) for n in (1, 2)])).permute(3, 0, 1, 2)
    crop = _drawn(9, 0, 3, Augmentation())
    assert torch.equal(trained["rgb"], crop_resize(frames, crop, (28, 28)))


def test_a_videos_crop_is_that_of_its_pictures(tmp_path: Path) -> None:
    pytest.importorskip("av")
    from PIL import Image
    from video_files import decode_all, write_clip

    path = write_clip(tmp_path / "clip.mp4", 6)
    for number, frame in enumerate(decode_all(path)):
        Image.fromarray(frame).save(tmp_path / f"{number:02d}.png")
    options: dict[str, Any] = dict(num_frames=3, stride=1, size=28, train=True, augment=Augmentation(flip=1.0))
    items = [
        ClipDataset([ClipRecord(3, "a", {"rgb": source}, 1, 4)], **options)[0]
        for source in (path, f"{tmp_path}/{{:02d}}.png")
    ]
    assert same_items(items[0], items[1])


def test_own_statistics(tmp_path: Path) -> None:
    record = write_record(tmp_path, 0, ["flow"])
    plain = {"flow": ((0.0, 0.0), (1.0, 1.0))}
    item = ClipDataset([record], ["flow"], num_frames=1, size=28, statistics=plain)[0]
    assert torch.equal(item["flow"][:, 0], torch.from_numpy(array_frame("flow", 1)).permute(2, 0, 1))


def test_labels_and_no_labels(tmp_path: Path) -> None:
    records = [write_record(tmp_path, 0, label=7), write_record(tmp_path, 1)]
    dataset = ClipDataset(records, num_frames=1, size=16)
    assert dataset.labels == [7, -1]
    assert [item["label"] for item in (dataset[0], dataset[-1])] == [7, -1]


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modalities": ("depth",)}, "modalities must be one of"),
        ({"modalities": ()}, "at least one"),
        ({"modalities": ("rgb", "rgb")}, "each one once"),
        ({"modalities": ("rgb", "flow")}, "records: 1 of 1 have no flow, clip-0 first"),
        ({"num_frames": 0}, "num_frames must be at least 1"),
        ({"stride": 0}, "stride must be at least 1"),
        ({"max_broken": -1}, "max_broken"),
        ({"size": 0}, "size must be"),
        ({"position": "end"}, "position must be one of"),
        ({"resize": "pad"}, "resize must be one of"),
        ({"augment": "flip"}, "augment must be one of"),
        ({"on_broken": "ignore"}, "on_broken must be one of"),
        ({"statistics": {"rgb": ((0,) * 3, (1,) * 3)}}, "statistics must be one of flow, pose"),
    ],
)
def test_senseless_arguments_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClipDataset([write_record(tmp_path)], **options)


@pytest.mark.parametrize("options", [{"modalities": "rgb"}, {"num_frames": 2.0}, {"stride": True}, {"augment": 3}])
def test_arguments_of_a_wrong_type_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(options))):
        ClipDataset([write_record(tmp_path)], **options)


def test_sizes_and_statistics_must_fit_the_modality(tmp_path: Path) -> None:
    record = write_record(tmp_path, 0, ["pose"])
    with pytest.raises(ValueError, match="a multiple of 4 with pose"):
        ClipDataset([record], ["pose"], size=30)
    with pytest.raises(ValueError, match="statistics of pose must be"):
        ClipDataset([record], ["pose"], statistics={"pose": ((0.3,), (0.3,))})


def test_two_records_of_one_id_are_refused(tmp_path: Path) -> None:
    record = write_record(tmp_path)
    with pytest.raises(ValueError, match="clip-0 and twin have the same clip_id 0"):
        ClipDataset([record, dataclasses.replace(record, name="twin")])


def test_an_index_past_the_end_is_an_index_error(tmp_path: Path) -> None:
    with pytest.raises(IndexError):
        ClipDataset([write_record(tmp_path)])[1]
