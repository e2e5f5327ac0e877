"""Annotation files of Ego4D, EPIC-KITCHENS-55, MECCANO and WEAR: paths, labels, sampling, and what is wrong with one."""

import json
from pathlib import Path
from typing import Any

import pytest

from mmfast.data.annotations import EGO4D_BLACKLIST, check_disjoint, parse_time, read_annotations, read_ego4d
from mmfast.data.records import ClipRecord


def _ego4d(video: str, frame: int, verb: int, noun: int) -> dict[str, Any]:
    return {
        "uid": f"{video}_{frame:07d}",
        "video_id": video,
        "frame": frame + 1000,
        "clip_id": 7,
        "clip_uid": f"clip-{video}",
        "clip_frame": frame,
        "verb": f"verb{verb}",
        "noun": f"noun{noun}",
        "verb_label": verb,
        "noun_label": noun,
        "box": [0.0, 1.0, 2.0, 3.0],
        "time_to_contact": 0.5,
    }


EPIC = {
    "uid": "7",
    "participant_id": "P01",
    "video_id": "P01_01",
    "start_timestamp": "00:00:21.91",
    "stop_timestamp": "00:00:23.33",
    "start_frame": "1314",
    "stop_frame": "1399",
}
MECCANO = {"video_id": "0001", "start_frame": 5775, "end_frame": 5782}
WEAR = {"video_id": "sbj_0", "start_frame": 39040}
UNLABELLED = {"epic": EPIC, "meccano": MECCANO, "wear": WEAR}
VAL: dict[str, dict[str, Any]] = {
    "epic": {
        "uid": "7",
        "participant_id": "P01",
        "video_id": "P01_01",
        "start_frame": "1314",
        "verb_label": "3",
        "noun_label": "10",
        "action_idx": "12",
    },
    "meccano": {**MECCANO, "action_id": 51, "action_name": "plug_screw", "action_id_internal": 3},
    "wear": {**WEAR, "label": "stretching (triceps)", "label_id": 5, "label_id_internal": 1},
}


@pytest.fixture
def write(tmp_path):
    def write(clips: Any, split: str | None = "val", **around: Any) -> Path:
        path = tmp_path / "annotations.json"
        given = {"split": split} if split is not None else {}
        path.write_text(json.dumps({"version": 1.0, "date": 231002, **given, **around, "clips": clips}))
        return path

    return write


def unlabelled(write, dataset: str, *clips: dict[str, Any], **options: Any):
    return read_annotations(
        dataset, write(list(clips) or [UNLABELLED[dataset]], "train (unlabel)"), "/data", modalities=ALL, **options
    )


ALL = ("rgb", "flow", "pose")

# -- where the frames lie --


def test_ego4d_paths_are_the_published_ones(write):
    found = read_annotations("ego4d", write([_ego4d("v", 33, 1, 2)]), "/data", modalities=ALL)
    assert found[0].sources == {
        "rgb": "/data/image_frame/clip-v/{:06d}.jpg",
        "flow": "/data/optical_flow/clip-v/npy/{:06d}.npy",
        "pose": "/data/hand-pose/heatmap/clip-v/{:06d}.npy",
    }


def test_epic_paths_are_the_published_ones(write):
    assert unlabelled(write, "epic")[0].sources == {
        "rgb": "/data/frames/rgb/train/P01/P01_01/frame_{:010d}.jpg",
        "flow": "/data/frames/flow/train/P01/P01_01/frame_{:010d}.npy",
        "pose": "/data/frames/pose/train/P01/P01_01/frame_{:010d}.npy",
    }


@pytest.mark.parametrize(("dataset", "video", "digits"), [("meccano", "0001", 5), ("wear", "sbj_0", 6)])
def test_meccano_and_wear_paths_are_the_published_ones(write, dataset, video, digits):
    number = f"{{:0{digits}d}}"
    assert unlabelled(write, dataset)[0].sources == {
        "rgb": f"/data/RGB_frames/{video}/{number}.jpg",
        "flow": f"/data/flow_frames/{video}/{number}.npy",
        "pose": f"/data/hand-pose/heatmap/{video}/{number}.npy",
    }


def test_a_template_may_name_any_field_of_the_annotation(write):
    templates = {"rgb": "{clip_id:03d}/{verb}/{frame}.png", "depth": "depth/{uid}.mp4"}
    found = read_ego4d(write([_ego4d("v", 33, 1, 2)]), "/data", templates=templates)
    assert found[0].sources == {"rgb": "/data/007/verb1/{:}.png", "depth": Path("/data/depth/v_0000033.mp4")}
    assert str(found[0].sources["rgb"]).format(5) == "/data/007/verb1/5.png"


def test_one_template_and_one_root_a_modality(write):
    roots = {"rgb": "/fast", "flow": "/slow"}
    found = read_annotations(
        "wear", write([VAL["wear"]]), roots, modalities=("rgb", "flow"), templates="{modality}/{video_id}.{ext}"
    )
    assert found[0].sources == {"rgb": Path("/fast/rgb/sbj_0.jpg"), "flow": Path("/slow/flow/sbj_0.npy")}


def test_braces_in_a_folder_s_name_survive(write):
    found = read_annotations("wear", write([VAL["wear"]]), "/data{1}")
    assert str(found[0].sources["rgb"]).format(12) == "/data{1}/RGB_frames/sbj_0/000012.jpg"


def test_nothing_is_absolute_unless_the_user_says_so(write):
    assert read_annotations("wear", write([VAL["wear"]]))[0].sources == {"rgb": "RGB_frames/sbj_0/{:06d}.jpg"}


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{participant}/{subject}/{frame}.jpg", r"unknown fields: participant, subject; there are .*video_id"),
        ("{video_id.name}/{frame}.jpg", "must be a plain name"),
        ("{video_id!r}/{frame}.jpg", "must be a plain name"),
        ("{}/x.jpg", "must be a plain name"),
        ("{video_id", "cannot be read"),
        ("{frame:x}.jpg", "frame takes a format like 06d, got 'x'"),
        ("{frame}/{frame}.jpg", "more than once"),
        ("{video_id:06d}/{frame}.jpg", "clip 0 .*'video_id' does not fit"),
    ],
)
def test_a_wrong_template_is_refused(write, template, match):
    with pytest.raises(ValueError, match=match):
        read_annotations("wear", write([VAL["wear"]]), templates={"rgb": template})


def test_a_modality_without_a_template_is_refused(write):
    with pytest.raises(ValueError, match="no template for modality 'depth': wear has ones for rgb, flow, pose"):
        read_annotations("wear", write([VAL["wear"]]), modalities=("depth",))


def test_a_template_that_no_modality_uses_is_refused(write):
    with pytest.raises(ValueError, match="templates are given for depth"):
        read_annotations("wear", write([VAL["wear"]]), modalities=("rgb",), templates={"depth": "x"})


def test_a_root_must_be_there_for_every_modality(write):
    with pytest.raises(ValueError, match="root must name a folder for 'flow'"):
        read_annotations("wear", write([VAL["wear"]]), {"rgb": "a"}, modalities=("rgb", "flow"))


# -- frames --


@pytest.mark.parametrize(("dataset", "stride"), [("ego4d", 4), ("epic", 8), ("meccano", 1), ("wear", 8)])
def test_sixteen_frames_at_the_published_rate(write, dataset, stride):
    found = read_annotations(dataset, write([_ego4d("v", 33, 1, 2) if dataset == "ego4d" else VAL[dataset]]))
    assert (found.num_frames, found.stride) == (16, stride)


def test_a_clip_starts_at_its_annotated_frame_and_runs_on_into_the_video(write):
    assert [(r.start, r.stop) for r in unlabelled(write, "epic")] == [(1314, None)]


@pytest.mark.parametrize(
    ("dataset", "bounds"), [("epic", (1314, 1400)), ("meccano", (5775, 5783)), ("wear", (39040, None))]
)
def test_the_annotated_end_is_kept_on_request(write, dataset, bounds):
    found = unlabelled(write, dataset, clip_end="annotated")
    assert (found[0].start, found[0].stop) == bounds


def test_ego4d_starts_at_the_frame_of_the_clip_not_of_the_video(write):
    assert read_ego4d(write([_ego4d("v", 33, 1, 2)]))[0].start == 33


def test_frames_are_numbered_from_one(write):
    assert read_ego4d(write([_ego4d("v", 0, 1, 2)]))[0].start == 1


def test_times_stand_in_for_frames_that_are_not_given(write):
    clip = {k: v for k, v in EPIC.items() if not k.endswith("_frame")}
    found = unlabelled(write, "epic", clip, clip_end="annotated")
    assert (found[0].start, found[0].stop) == (1314, 1400)


@pytest.mark.parametrize(("text", "seconds"), [("01:02:03.50", 3723.5), ("02:03", 123.0), ("3.25", 3.25), (7, 7.0)])
def test_times_are_read(text, seconds):
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "1:2:3:4", "ten", "-1", None])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ValueError, match="a time must be"):
        parse_time(text)


# -- labels --


def test_an_unlabelled_split_has_no_labels(write):
    found = unlabelled(write, "meccano")
    assert found.split == "train (unlabel)"
    assert found.labels == [None]
    assert found.classes == {}


def test_ego4d_classes_are_numbered_in_the_order_of_first_appearance(write):
    clips = [_ego4d("v", i, verb, noun) for i, (verb, noun) in enumerate([(9, 1), (2, 1), (9, 1), (1, 9)])]
    found = read_ego4d(write(clips, split=None))
    assert found.labels == [0, 1, 0, 2]
    assert found.classes == {0: "verb9 noun1", 1: "verb2 noun1", 2: "verb1 noun9"}


@pytest.mark.parametrize(
    ("dataset", "label", "name"),
    [("epic", 12, "verb 3 noun 10"), ("meccano", 51, "plug_screw"), ("wear", 5, "stretching (triceps)")],
)
def test_labels_are_the_data_set_s_own(write, dataset, label, name):
    found = read_annotations(dataset, write([VAL[dataset]]))
    assert (found[0].label, found[0].label_name) == (label, name)
    assert found.classes == {label: name}


def test_a_class_that_has_two_names_is_refused(write):
    clips = [VAL["wear"], {**VAL["wear"], "label": "jogging"}]
    with pytest.raises(ValueError, match=r"clip 1 .*class 5 is called 'jogging'.*'stretching \(triceps\)'"):
        read_annotations("wear", write(clips))


def test_a_wrong_number_of_classes_is_warned_of(write):
    with pytest.warns(UserWarning, match="num_actions says 15, its clips show 1 classes"):
        read_annotations("wear", write([VAL["wear"]], num_actions=15))


def test_blacklisted_videos_are_left_out_before_classes_are_numbered(write):
    clips = [_ego4d(EGO4D_BLACKLIST[2], 1, 5, 5), _ego4d("v", 2, 6, 6)]
    assert [(r.clip_id, r.label, r.label_name) for r in read_ego4d(write(clips))] == [(0, 0, "verb6 noun6")]
    assert read_ego4d(write(clips), blacklist=()).labels == [0, 1]


def test_a_blacklist_of_everything_is_refused(write):
    with pytest.raises(ValueError, match="every clip's video is in the blacklist"):
        read_ego4d(write([_ego4d("v", 2, 6, 6)]), blacklist=["v"])


def test_names_are_unique_even_where_the_file_repeats_a_clip(write):
    names = [record.name for record in unlabelled(write, "meccano", MECCANO, MECCANO)]
    assert names == ["0001:5775:5782", "0001:5775:5782 #2"]


# -- what is wrong with a file --


@pytest.mark.parametrize(
    ("dataset", "field"),
    [
        ("ego4d", "clip_frame"),
        ("ego4d", "clip_uid"),
        ("ego4d", "noun_label"),
        ("epic", "participant_id"),
        ("epic", "start_frame"),
        ("epic", "action_idx"),
        ("meccano", "action_id"),
        ("meccano", "action_name"),
        ("wear", "video_id"),
        ("wear", "label_id"),
    ],
)
def test_a_missing_field_is_named_with_file_and_clip(write, dataset, field):
    whole = _ego4d("v", 33, 1, 2) if dataset == "ego4d" else VAL[dataset]
    path = write([whole, {k: v for k, v in whole.items() if k != field}])
    with pytest.raises(ValueError, match=rf"annotations\.json: clip 1 .*'{field}' is missing"):
        read_annotations(dataset, path)


@pytest.mark.parametrize("value", ["twelve", None, True, 1.5, [3], "nan", "inf"])
def test_an_odd_frame_is_named_with_file_and_clip(write, value):
    path = write([{**VAL["wear"], "start_frame": value}])
    with pytest.raises(ValueError, match=r"annotations\.json: clip 0 .*'start_frame' must be a whole number"):
        read_annotations("wear", path)


def test_an_end_before_the_start_is_refused(write):
    with pytest.raises(ValueError, match=r"clip 0 .*'end_frame' is 3, before the start 5775"):
        unlabelled(write, "meccano", {**MECCANO, "end_frame": 3}, clip_end="annotated")


@pytest.mark.parametrize("split", [None, "train", "test"])
def test_the_split_is_checked(write, split):
    with pytest.raises(ValueError, match=r"split must be 'train \(unlabel\)' or 'val', the file says"):
        read_annotations("epic", write([VAL["epic"]], split))


def test_a_labelled_file_is_not_taken_for_an_unlabelled_one(write):
    with pytest.raises(ValueError, match=r"split must be 'train \(unlabel\)', the file says 'val'"):
        read_annotations("wear", write([VAL["wear"]]), split="train (unlabel)")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "is no JSON: .* in line 1"),
        ("[]", 'must hold an object with a list "clips", got a list'),
        ('{"split": "val"}', r"got an object with \['split'\]"),
        ('{"split": "val", "clips": []}', '"clips" is empty'),
        ('{"split": "val", "clips": [3]}', "clip 0: must be an object with fields, got int"),
    ],
)
def test_a_file_of_another_shape_is_refused(tmp_path, text, match):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=match):
        read_annotations("wear", path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.json: cannot be read: No such file"):
        read_annotations("wear", tmp_path / "none.json")


@pytest.mark.parametrize(
    ("options", "match"),
    [({"dataset": "kinetics"}, "dataset must be one of ego4d, epic"), ({"clip_end": "x"}, "clip_end must be one of")],
)
def test_a_wrong_argument_is_refused(write, options, match):
    with pytest.raises(ValueError, match=match):
        read_annotations(**{"dataset": "wear", "path": write([VAL["wear"]]), **options})


def test_modalities_as_one_text_are_refused(write):
    with pytest.raises(TypeError, match="modalities must be a sequence of names"):
        read_annotations("wear", write([VAL["wear"]]), modalities="rgb")


# -- source and target --


def _named(*names: str | None) -> list[ClipRecord]:
    return [ClipRecord(i, str(i), label_name=name) for i, name in enumerate(names)]


def test_classes_in_both_domains_are_refused_by_name():
    with pytest.raises(ValueError, match="share 2 of the target's 3 classes: put cup, take_screw"):
        check_disjoint(_named("Take screw", "put cup", "cut"), _named("put cup", "take_screw", None, "fold"))


def test_classes_in_both_domains_are_warned_of():
    with pytest.warns(UserWarning, match="share 1 of"):
        assert check_disjoint(_named("cut"), _named("cut"), on_overlap="warn") == ["cut"]


def test_disjoint_domains_and_unlabelled_clips_pass():
    assert check_disjoint(_named("stretching (triceps)"), _named("stretching (arms)", None)) == []
