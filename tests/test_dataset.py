"""ClipDataset: which frames, the same cut for every modality, reproducible augmentation, broken clips, batches."""

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from frame_files import array_frame, scene, write_frame, write_record
from torch.utils.data import DataLoader

from mmfast.config import ViTConfig
from mmfast.data.dataset import ClipDataset, collate
from mmfast.data.frames import ClipError, frame_path
from mmfast.data.records import ClipRecord
from mmfast.data.transforms import Augmentation, Crop, centre_crop, crop_flow, crop_resize, normalize
from mmfast.data.video import resize_frames

ALL = ("rgb", "flow", "pose")


def _records(root: Path, count: int = 4, **options: Any) -> list[ClipRecord]:
    return [write_record(root, i, label=i % 2, **options) for i in range(count)]


def _break(record: ClipRecord) -> ClipRecord:
    """Takes the clip's files away."""
    for source in record.sources.values():
        shutil.rmtree(Path(source).parent)
    return record


def _shown(item: dict[str, Any], numbers: Sequence[int] = range(1, 40), clip: int = 0) -> list[int]:
    """Numbers of the frames that an item of `size` (48, 80), the stored one, shows."""
    known = {scene(n, clip).tobytes(): n for n in numbers}
    return [known[item["rgb"][:, i].permute(1, 2, 0).numpy().tobytes()] for i in range(item["rgb"].shape[1])]


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)


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
    assert _same(a, b)


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
    assert _same(items[0], items[1])


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


# -- reproducible ------------------------------------------------------------------------------------------------------


def _training(records: list[ClipRecord], **options: Any) -> ClipDataset:
    return ClipDataset(records, num_frames=2, stride=1, size=16, train=True, **options)


def test_an_item_depends_on_seed_epoch_and_clip_alone(tmp_path: Path) -> None:
    records = _records(tmp_path)
    first = _training(records, seed=1)
    first.set_epoch(2)
    for index in (3, 0, 3):
        first[index]
    second = _training(records[::-1], seed=1)
    second.set_epoch(2)
    assert _same(first[1], second[2])


@pytest.mark.parametrize("change", ["seed", "epoch", "clip"])
def test_seed_epoch_and_clip_each_change_the_draw(tmp_path: Path, change: str) -> None:
    record = write_record(tmp_path)
    other = dataclasses.replace(record, clip_id=1) if change == "clip" else record
    a, b = _training([record]), _training([other], seed=int(change == "seed"))
    b.set_epoch(int(change == "epoch"))
    assert not torch.equal(a[0]["rgb"], b[0]["rgb"])


def _all(loader: DataLoader[Any]) -> dict[int, torch.Tensor]:
    return {int(i): rgb for batch in loader for i, rgb in zip(batch["clip_id"], batch["rgb"], strict=True)}


def test_worker_counts_give_the_same_clips_and_see_the_epoch(tmp_path: Path) -> None:
    records = _records(tmp_path, 6)
    here, there = _training(records), _training(records)
    workers: DataLoader[Any] = DataLoader(
        there, 2, num_workers=2, collate_fn=collate, persistent_workers=True, shuffle=True
    )
    seen = []
    for epoch in (0, 1):
        here.set_epoch(epoch)
        there.set_epoch(epoch)
        alone, shared = _all(DataLoader(here, 3, collate_fn=collate)), _all(workers)
        assert alone.keys() == shared.keys() == set(range(6))
        assert all(torch.equal(alone[i], shared[i]) for i in alone)
        seen.append(alone[0])
    assert not torch.equal(seen[0], seen[1])


def test_workers_report_their_faults(tmp_path: Path) -> None:
    records = _records(tmp_path)
    _break(records[1])
    frame_path(records[2].sources["rgb"], 5).unlink()
    dataset = ClipDataset(records, num_frames=2, size=16)
    ids = [batch["clip_id"].tolist() for batch in DataLoader(dataset, 2, num_workers=2, collate_fn=collate)]
    assert ids == [[0], [2, 3]]
    assert (dataset.faults.broken, dataset.faults.missing_clips) == (("clip-1",), 1)


def test_spawned_workers_report_their_faults(tmp_path: Path) -> None:
    """In a process of its own: spawned workers import the main module again."""
    records = _records(tmp_path)
    _break(records[1])
    code = f"""
import torch
from torch.utils.data import DataLoader
from mmfast.data.dataset import ClipDataset, collate
from mmfast.data.records import ClipRecord
if __name__ == "__main__":
    records = [ClipRecord(i, f"clip-{{i}}", {{"rgb": f"{tmp_path}/rgb/{{i}}/frame_{{{{:06d}}}}.png"}}, 1, 9) for i in range(4)]
    dataset = ClipDataset(records, num_frames=2, size=16)
    loader = DataLoader(dataset, 2, num_workers=1, collate_fn=collate, multiprocessing_context="spawn")
    print([batch["clip_id"].tolist() for batch in loader], dataset.faults.broken)
"""
    (tmp_path / "main.py").write_text(code)
    out = subprocess.run([sys.executable, tmp_path / "main.py"], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[[0], [2, 3]] ('clip-1',)"


# -- broken clips ------------------------------------------------------------------------------------------------------


def test_training_replaces_a_broken_clip_by_the_same_other(tmp_path: Path) -> None:
    records = _records(tmp_path, 5)
    _break(records[2])
    a, b = _training(records), _training(records)
    item = a[2]
    b[4]
    assert _same(item, b[2])
    assert item["clip_id"] != 2
    assert item["broken"] >= 1
    assert torch.equal(item["rgb"], a[item["clip_id"]]["rgb"])


def test_faults_name_the_clips_and_say_why(tmp_path: Path) -> None:
    records = _records(tmp_path, 5)
    _break(records[2])
    frame_path(records[0].sources["rgb"], 2).unlink()
    records[3] = dataclasses.replace(records[3], stop=2)
    dataset = ClipDataset(records, num_frames=3, stride=1, size=16)
    for _ in range(2):
        for index in range(5):
            dataset[index]
    faults = dataset.faults
    assert faults.broken == ("clip-2",)
    assert (faults.missing_frames, faults.missing_clips, faults.clamped_frames, faults.clamped_clips) == (1, 1, 2, 1)
    summary = faults.summary()
    assert "1 of 5 clips cannot be read and were left out:\n  clip-2: rgb: none of its 3 frames can be read" in summary
    assert "1 frames of 1 clips are missing" in summary
    assert "2 frames of 1 clips lie past" in summary
    dataset.set_epoch(1)
    assert not dataset.faults
    assert dataset.faults.summary() == ""


def test_faults_of_many_clips_are_cut_short(tmp_path: Path) -> None:
    records = [_break(record) for record in _records(tmp_path, 6)]
    dataset = ClipDataset(records, num_frames=1, size=16)
    for index in range(6):
        dataset[index]
    assert dataset.faults.summary().splitlines()[0].startswith("6 of 6")
    assert dataset.faults.summary().splitlines()[-1] == "  and 3 more"


def test_a_clip_that_comes_back_is_said(tmp_path: Path) -> None:
    record = _break(write_record(tmp_path))
    dataset = ClipDataset([record], num_frames=1, size=16)
    dataset[0]
    write_record(tmp_path)
    assert dataset.faults.reasons == ("clip-0: could not be read then, can be read now",)


def test_too_many_broken_in_a_row_name_the_first(tmp_path: Path) -> None:
    records = [_break(record) for record in _records(tmp_path, 5)]
    with pytest.raises(ClipError, match=r"clip-3: rgb: none of its 2 .*\n4 clips in a row"):
        _training(records, max_broken=3)[3]
    dataset = ClipDataset(records, num_frames=1, size=16, max_broken=2)
    dataset[0], dataset[1]
    with pytest.raises(ClipError, match="clip-0: .*\n3 clips in a row"):
        dataset[2]


def test_a_good_clip_ends_the_row(tmp_path: Path) -> None:
    records = _records(tmp_path, 3)
    _break(records[0])
    dataset = ClipDataset(records, num_frames=1, size=16, max_broken=1)
    for index in (0, 1, 0, 2, 0):
        dataset[index]
    assert dataset.faults.broken == ("clip-0",)


def test_the_error_reaches_the_main_process_as_itself(tmp_path: Path) -> None:
    records = [_break(record) for record in _records(tmp_path, 2)]
    dataset = ClipDataset(records, num_frames=1, size=16, on_broken="raise")
    with pytest.raises(ClipError, match="clip-0: rgb: its frame cannot be read; .*no such file"):
        next(iter(DataLoader(dataset, 1, num_workers=1, collate_fn=collate)))


# -- batches -----------------------------------------------------------------------------------------------------------


def test_a_batch_keeps_dtypes_and_the_decoders_layout(tmp_path: Path) -> None:
    dataset = ClipDataset(_records(tmp_path, 2, modalities=ALL), ALL, num_frames=2, stride=1, size=28)
    items = [dataset[0], dataset[1]]
    batch = collate(items)
    assert batch["clip_id"].tolist() == [0, 1]
    assert batch["label"].tolist() == [0, 1]
    for modality in ALL:
        assert torch.equal(batch[modality], torch.stack([item[modality] for item in items]))
        assert batch[modality].dtype == (torch.uint8 if modality == "rgb" else torch.float32)
    assert batch["rgb"].permute(0, 2, 3, 4, 1).is_contiguous()


def test_a_skipped_clip_is_left_out_of_its_batch_and_counted(tmp_path: Path) -> None:
    records = _records(tmp_path, 3)
    _break(records[1])
    dataset = ClipDataset(records, num_frames=2, size=16)
    batch = collate([dataset[1], dataset[0], dataset[2]])
    assert batch["clip_id"].tolist() == [0, 2]
    assert batch["label"].tolist() == [0, 0]
    assert torch.equal(batch["rgb"], torch.stack([dataset[0]["rgb"], dataset[2]["rgb"]]))
    assert batch["broken"].tolist() == [0, 0, 1]


def test_a_batch_of_skipped_clips_has_no_clips(tmp_path: Path) -> None:
    records = [_break(record) for record in _records(tmp_path, 2, modalities=ALL)]
    dataset = ClipDataset(records, ALL, num_frames=2, size=16)
    batch = collate([dataset[0], dataset[1]])
    assert batch["rgb"].shape == (0, 3, 2, 16, 16)
    assert batch["pose"].shape == (0, 21, 2, 4, 4)
    assert batch["clip_id"].tolist() == []
    assert int(batch["broken"].sum()) == 2


def test_an_empty_list_is_no_batch() -> None:
    with pytest.raises(ValueError, match="at least one item"):
        collate([])


@pytest.mark.gpu
def test_pinned_batches_reach_the_device_as_they_are(tmp_path: Path) -> None:
    dataset = _training(_records(tmp_path, 4))
    loader: DataLoader[Any] = DataLoader(
        dataset, 2, num_workers=2, collate_fn=collate, pin_memory=True, persistent_workers=True
    )
    for batch in loader:
        assert batch["rgb"].is_pinned()
        on_device = batch["rgb"].cuda(non_blocking=True)
        assert on_device.stride() == batch["rgb"].stride()
        assert torch.equal(on_device.cpu(), torch.stack([dataset[int(i)]["rgb"] for i in batch["clip_id"]]))


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
