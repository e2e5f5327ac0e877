"""Manifests of one's own: CSV and JSON in and out, folders of class folders, and what is wrong with one, line by line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mmfast.data.manifest import folder_manifest, read_manifest, write_manifest
from mmfast.data.records import AnnotationSet, ClipRecord


@pytest.fixture
def files(tmp_path):
    """Three videos and a folder of numbered frames: only that they are there matters here."""
    for name in ("a.mp4", "b.mp4", "c.mp4", "flow/a/0001.npy"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def _csv(folder: Path, text: str, name: str = "list.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def _json(folder: Path, data: object) -> Path:
    return _csv(folder, json.dumps(data), "list.json")


# -- reading --


def test_csv_columns_become_records(files):
    path = _csv(files, "path,start,stop,label,flow\na.mp4,3,30,wave,flow/a/{:04d}.npy\nb.mp4,,,point,\n")
    found = read_manifest(path, stride=2)
    assert found.records == [
        ClipRecord(0, "a.mp4:3-30", {"rgb": files / "a.mp4", "flow": f"{files}/flow/a/{{:04d}}.npy"}, 3, 30, 1, "wave"),
        ClipRecord(1, "b.mp4", {"rgb": files / "b.mp4"}, 0, None, 0, "point"),
    ]
    assert (found.stride, found.classes) == (2, {0: "point", 1: "wave"})


def test_json_says_the_same_as_csv(files):
    clips = [{"path": "a.mp4", "start": 3, "stop": 30, "label": "wave"}, {"rgb": "b.mp4", "label": "point"}]
    csv = read_manifest(_csv(files, "path,start,stop,label\na.mp4,3,30,wave\nb.mp4,,,point\n"))
    assert read_manifest(_json(files, clips)).records == csv.records


def test_json_keeps_what_is_said_about_the_whole(files):
    found = read_manifest(_json(files, {"split": "val", "stride": 8, "clips": [{"path": "a.mp4"}]}))
    assert (found.split, found.stride) == ("val", 8)


def test_an_argument_s_stride_goes_before_the_file_s(files):
    assert read_manifest(_json(files, {"stride": 8, "clips": [{"path": "a.mp4"}]}), stride=3).stride == 3


def test_frames_say_how_many(files):
    assert read_manifest(_csv(files, "path,start,frames\na.mp4,5,20\n"))[0].stop == 25


def test_times_need_the_rate(files):
    path = _csv(files, "path,start,stop\na.mp4,00:00:02.5,00:00:04\n")
    found = read_manifest(path, fps=30)[0]
    assert (found.start, found.stop) == (75, 120)
    with pytest.raises(ValueError, match="line 2: start: '00:00:02.5' is a time: pass fps"):
        read_manifest(path)


def test_paths_start_from_root_when_given(files, tmp_path_factory):
    elsewhere = _csv(tmp_path_factory.mktemp("lists"), "path\na.mp4\n")
    assert read_manifest(elsewhere, files)[0].sources == {"rgb": files / "a.mp4"}


def test_absolute_paths_stay(files, tmp_path_factory):
    elsewhere = _csv(tmp_path_factory.mktemp("lists"), f"path\n{files / 'a.mp4'}\n")
    assert read_manifest(elsewhere)[0].sources == {"rgb": files / "a.mp4"}


def test_tabs_quotes_a_byte_order_mark_and_blank_lines(files):
    path = _csv(files, '\ufeffpath\tlabel\n\n"a.mp4"\t"wave, both hands"\n\nb.mp4\tpoint\n', "list.tsv")
    assert [record.label_name for record in read_manifest(path)] == ["wave, both hands", "point"]


def test_another_modality_on_request(files):
    path = _csv(files, "path,depth\na.mp4,b.mp4\n")
    assert read_manifest(path, modalities=("rgb", "depth"))[0].sources["depth"] == files / "b.mp4"


# -- labels --


def test_class_names_are_numbered_in_sorted_order(files):
    found = read_manifest(_csv(files, "path,label\na.mp4,wave\nb.mp4,\nc.mp4,clap\n"))
    assert found.labels == [1, None, 0]


def test_labels_that_are_numbers_stand_for_themselves(files):
    found = read_manifest(_csv(files, "path,label\na.mp4,10\nb.mp4,2\n"))
    assert found.labels == [10, 2]
    assert found.classes == {2: "2", 10: "10"}


def test_classes_fix_the_numbers(files):
    found = read_manifest(_csv(files, "path,label\na.mp4,wave\nb.mp4,clap\n"), classes=["wave", "point", "clap"])
    assert found.labels == [0, 2]


def test_a_label_that_is_none_of_the_classes_is_named(files):
    path = _csv(files, "path,label\na.mp4,wave\nb.mp4,clap\n")
    with pytest.raises(ValueError, match="line 3: label 'clap' is none of the 1 classes"):
        read_manifest(path, classes=["wave"])


def test_a_class_number_with_two_names_is_refused(files):
    path = _csv(files, "path,label,label_id\na.mp4,wave,4\nb.mp4,clap,4\n")
    with pytest.raises(ValueError, match="line 3: class 4 is called 'clap', earlier 'wave'"):
        read_manifest(path)


# -- what is wrong with a manifest --


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "line 1: the header must name path or a modality, got -"),
        ("path\n", "lists no clip"),
        ("path,lable,depth\na.mp4,x,y\n", r"line 1 \(the header\): unknown columns 'lable', 'depth'; known are path"),
        ("path,path\na.mp4,b.mp4\n", "line 1: columns given twice: 'path'"),
        ("label,start\nwave,3\n", "line 1: the header must name path or a modality"),
        ("path,label\na.mp4,wave,3\n", "line 2: 3 cells, the header names 2"),
        ('path,label\na.mp4,"wave\n', "line 2: is no CSV"),
        ("path,rgb\na.mp4,a.mp4\n", "line 2: give path or rgb, not both"),
        ("path,label\n,wave\n", "line 2: names no file"),
        ("path,start\na.mp4,-3\n", "line 2: start: must be a whole number from 0 on, got '-3'"),
        ("path,stop\na.mp4,x\n", "line 2: stop: must be a whole number"),
        ("path,start,stop\na.mp4,9,9\n", "line 2: stop 9 must be greater than start 9"),
        ("path,stop,frames\na.mp4,9,9\n", "line 2: give stop or frames, not both"),
        ("path,label_id\na.mp4,one\n", "line 2: label_id: must be a whole number"),
        ("path\n{a}.jpg\n", r"line 2: .*\{a\}\.jpg: not a path with one number field"),
        ("path\nnone.mp4\n", r"line 2: rgb: no such file: .*none\.mp4"),
        ("path,flow\na.mp4,flow/b/{:04d}.npy\n", "line 2: flow: no such file: .*flow/b/"),
        ("path\na.mp4\n\nb.mp4\na.mp4\n", "line 5: name 'a.mp4' was given before, in line 2"),
        ("name,path\nx,a.mp4\nx,b.mp4\n", "line 3: name 'x' was given before, in line 2"),
    ],
)
def test_a_fault_is_named_with_its_line(files, text, match):
    with pytest.raises(ValueError, match=rf"list\.csv: {match}"):
        read_manifest(_csv(files, text))


def test_all_faults_are_named_at_once(files):
    rows = "".join(f"none{i}.mp4,\n" for i in range(12))
    with pytest.raises(ValueError, match=r"(?s)13 faults:\n  line 2: start.*line 3: rgb.*and 3 more$"):
        read_manifest(_csv(files, f"path,start\na.mp4,x\n{rows}"))


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ({"clip": []}, 'must be a list of clips or an object with a list "clips"'),
        ({"clips": [], "fps": 3}, "unknown fields fps"),
        ([], "lists no clip"),
        (["a.mp4"], r"clip 0 \(counted from 0\): must be an object, got str"),
        ([{"path": "a.mp4", "lable": 3}], "clip 0 .*unknown columns 'lable'"),
        ([{"path": 3}], "clip 0 .*rgb: must be a path, got 3"),
        ([{"path": "a.mp4", "start": 1.5}], "clip 0 .*start: must be a whole number from 0 on, got 1.5"),
        ([{"path": "a.mp4", "start": True}], "clip 0 .*start: must be a whole number"),
        ({"stride": 0, "clips": [{"path": "a.mp4"}]}, "stride must be a whole number from 1 on, got 0"),
    ],
)
def test_a_fault_in_json_is_named_with_its_clip(files, data, match):
    with pytest.raises(ValueError, match=match):
        read_manifest(_json(files, data))


def test_json_that_is_none_is_named_with_its_line(files):
    with pytest.raises(ValueError, match="line 2: is no JSON"):
        read_manifest(_csv(files, '[\n{"path": }]', "list.json"))


def test_a_manifest_that_is_not_there_or_of_another_kind(tmp_path):
    with pytest.raises(ValueError, match=r"none\.csv: cannot be read: No such file"):
        read_manifest(tmp_path / "none.csv")
    with pytest.raises(ValueError, match=r"must be a \.csv, \.tsv or \.json file"):
        read_manifest(tmp_path / "list.xlsx")
    (tmp_path / "latin.csv").write_bytes(b"path\n\xe9.mp4\n")
    with pytest.raises(ValueError, match="is no UTF-8 text"):
        read_manifest(tmp_path / "latin.csv")


def test_a_root_that_is_not_there_is_refused(files):
    with pytest.raises(ValueError, match="root must be a folder"):
        read_manifest(_csv(files, "path\na.mp4\n"), files / "none")


def test_missing_files_may_be_left_to_the_doctor(files):
    assert len(read_manifest(_csv(files, "path\nnone.mp4\n"), check_files=False)) == 1


# -- writing --


def _records(folder: Path) -> AnnotationSet:
    records = [
        ClipRecord(0, "one", {"rgb": folder / "a.mp4", "flow": f"{folder}/flow/a/{{:04d}}.npy"}, 3, 30, 7, "wave"),
        ClipRecord(1, "two, quoted", {"rgb": folder / "b.mp4"}, 0, None, 2, "zoom"),
        ClipRecord(2, "three", {"rgb": folder / "c.mp4"}),
    ]
    return AnnotationSet(records, 4, {2: "zoom", 7: "wave"}, "val", "list")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json"])
def test_what_is_written_is_read_back_the_same(files, suffix):
    written = _records(files)
    found = read_manifest(write_manifest(written, files / f"list{suffix}"))
    assert found.records == written.records
    assert found.classes == written.classes


def test_json_keeps_stride_and_split(files):
    assert read_manifest(write_manifest(_records(files), files / "list.json")) == _records(files)


def test_a_written_manifest_moves_with_its_files(files, tmp_path_factory):
    write_manifest(_records(files), files / "list.csv")
    moved = tmp_path_factory.mktemp("moved") / "set"
    files.rename(moved)
    assert read_manifest(moved / "list.csv")[0].sources["rgb"] == moved / "a.mp4"


def test_a_failed_write_leaves_the_old_manifest(files):
    path = write_manifest(_records(files), files / "list.json")
    before = path.read_bytes()
    broken = [replace(_records(files)[0], label_name=object())]
    with pytest.raises(TypeError):
        write_manifest(broken, path)
    assert path.read_bytes() == before
    assert sorted(p.name for p in files.iterdir() if "part" in p.name) == []


def test_a_manifest_appears_whole_or_not_at_all(files, monkeypatch):
    path = write_manifest(_records(files), files / "list.csv")
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_manifest(_records(files)[:1], path)
    assert path.read_bytes() == before


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must be a \.csv, \.tsv or \.json file"):
        write_manifest([], tmp_path / "list.txt")


# -- folders --


def _touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def test_a_folder_of_class_folders(tmp_path):
    _touch(tmp_path, "wave/b.MP4", "wave/sub/a.mkv", "clap/x.avi", "wave/.hidden.mp4", "wave/notes.txt", "readme.md")
    found = folder_manifest(tmp_path, stride=3)
    assert [(r.clip_id, r.name, r.label, r.label_name) for r in found] == [
        (0, "clap/x.avi", 0, "clap"),
        (1, "wave/b.MP4", 1, "wave"),
        (2, "wave/sub/a.mkv", 1, "wave"),
    ]
    assert found[1].sources == {"rgb": tmp_path / "wave" / "b.MP4"}
    assert (found.classes, found.stride) == ({0: "clap", 1: "wave"}, 3)


def test_folders_of_pictures_are_clips(tmp_path):
    _touch(tmp_path, "wave/one/0001.jpg", "wave/one/0002.jpg", "wave/two/0001.png")
    assert [r.sources["rgb"] for r in folder_manifest(tmp_path)] == [tmp_path / "wave/one", tmp_path / "wave/two"]


def test_an_empty_class_folder_is_warned_of(tmp_path):
    _touch(tmp_path, "wave/a.mp4", "clap/notes.txt")
    with pytest.warns(UserWarning, match="class folders without a clip: clap"):
        assert folder_manifest(tmp_path).classes == {0: "wave"}


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["a.mp4", "wave/b.mp4"], "1 videos lie outside the class folders: a.mp4"),
        (["wave/notes.txt"], "no class folder with a video"),
        (["readme.md"], "no class folder with a video"),
    ],
)
def test_a_folder_of_another_shape_is_refused(tmp_path, names, match):
    with pytest.raises(ValueError, match=match):
        folder_manifest(_touch(tmp_path, *names))


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="none: no such folder"):
        folder_manifest(tmp_path / "none")
