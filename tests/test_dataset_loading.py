"""ClipDataset under a loader: reproducible draws, worker processes, broken clips, batches."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from frame_files import ALL, same_items, write_record
from torch.utils.data import DataLoader

from mmfast.data.dataset import ClipDataset, collate
from mmfast.data.frames import ClipError, frame_path
from mmfast.data.records import ClipRecord


def _records(root: Path, count: int = 4, **options: Any) -> list[ClipRecord]:
    return [write_record(root, i, label=i % 2, **options) for i in range(count)]


def _break(record: ClipRecord) -> ClipRecord:
    """Takes the clip's files away."""
    for source in record.sources.values():
        shutil.rmtree(Path(source).parent)
    return record


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
    assert same_items(first[1], second[2])


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
    assert same_items(item, b[2])
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
