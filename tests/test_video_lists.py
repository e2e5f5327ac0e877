"""Lists of videos, tables of class names and vocabularies of label words, and what is wrong with bad ones."""

from pathlib import Path

import pytest

from mmfast.data.video_lists import label_words, read_class_names, read_video_list, read_words, write_words


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "file.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_path_and_label(tmp_path: Path) -> None:
    clips = read_video_list(written(tmp_path, "a/x y.mp4 2\n\nb.mp4,0\n"), "/data", names=["run", "sit", "eat"])
    assert [(r.clip_id, r.sources["rgb"], r.label, r.label_name) for r in clips] == [
        (0, Path("/data/a/x y.mp4"), 2, "eat"),
        (1, Path("/data/b.mp4"), 0, "run"),
    ]
    assert clips.classes == {0: "run", 2: "eat"}
    assert (clips[0].start, clips[0].stop) == (0, None)


def test_folders_of_frames_are_seen_from_their_three_columns(tmp_path: Path) -> None:
    clips = read_video_list(written(tmp_path, "v1 30 1\nv{2} 7 0\n"), "r", template="{:06d}.jpg")
    assert [(str(r.sources["rgb"]).format(5), r.start, r.stop, r.label) for r in clips] == [
        ("r/v1/000005.jpg", 1, 31, 1),
        ("r/v{2}/000005.jpg", 1, 8, 0),
    ]


def test_columns_can_be_said_where_paths_end_in_numbers(tmp_path: Path) -> None:
    clips = read_video_list(written(tmp_path, "clip 12 1\n"), columns="path label")
    assert (clips[0].name, clips[0].label) == ("clip 12", 1)


def test_labels_counted_from_one_and_lists_without_labels(tmp_path: Path) -> None:
    path = written(tmp_path, "Archery/v.avi 1\n")
    assert read_video_list(path, first_label=1, names=["Archery"])[0].label == 0
    assert read_video_list(path, columns="path")[0].label is None


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "is empty"),
        ("a.mp4\n", {}, "line 1: must be 'path label'"),
        ("a.mp4 0\nb.mp4 x\n", {}, "line 2: must be 'path label'"),
        ("a.mp4 3\n", {"names": ["a", "b"]}, "line 1: label must be 0 to 1, got 3"),
        ("a.mp4 0\n", {"first_label": 1}, "line 1: label must be 1 or more, got 0"),
        ("a 0 1\n", {}, "number of frames must be at least 1"),
        ("a 0\n", {"columns": "path n label"}, "line 1: must be 'path n label'"),
        ("a 0\n", {"columns": "label"}, "columns must be one of"),
    ],
)
def test_bad_lists(tmp_path: Path, text: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_video_list(written(tmp_path, text), **options)


def test_a_list_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none.txt: cannot be read"):
        read_video_list(tmp_path / "none.txt")


def test_class_names_with_and_without_a_heading_in_any_order(tmp_path: Path) -> None:
    assert read_class_names(written(tmp_path, 'id,name\n1,"put, then take"\n0,abseiling\n')) == [
        "abseiling",
        "put, then take",
    ]
    assert read_class_names(written(tmp_path, "0,a\n1,b\n")) == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "ids must be 0 to 0"),
        ("0,a\n2,b\n", "1 is missing"),
        ("0,a\n0,b\n", "line 2: id 0 stands there twice"),
        ("0,a,b\n", "a name with a comma stands in quotes"),
        ("id,name\n0,a\nx,b\n", "line 3: must be a whole number and a name"),
        ("0, \n", "must be a whole number and a name"),
    ],
)
def test_bad_class_names(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_class_names(written(tmp_path, text))


def test_words_written_are_read_back(tmp_path: Path) -> None:
    words = label_words(["Playing violin", "playing the PIANO"])
    assert words == {"piano": 0, "playing": 1, "the": 2, "violin": 3}
    write_words(words, tmp_path / "words.txt")
    assert read_words(tmp_path / "words.txt") == words


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a b 0\n", "line 1: must be a word and its id"),
        ("a x\n", "line 1: must be a word and its id"),
        ("a 0\nA 1\n", "line 2: 'a' stands there twice"),
        ("a 0\nb 0\n", "two words have one id"),
        ("a 0\nb 2\n", "1 is missing"),
    ],
)
def test_bad_words(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_words(written(tmp_path, text))
