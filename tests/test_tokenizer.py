"""The byte pair encoding against transformers' on a toy vocabulary, every source of one, and every bad input."""

import gzip
import importlib.util
import json
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from mmfast.data.tokenizer import END, START, VOCABULARY_FILE, ClipTokenizer, split_words

MERGES = [("t", "h"), ("th", "e</w>"), ("i", "n"), ("in", "g</w>"), ("p", "l"), ("pl", "a"), ("v", "i"), ("d", "e")]
TEXTS = [
    "A video of playing the violin",
    "it's 42 dogs' !!'s don't WE'LL",
    "café Ünïcode 你好 一二 ½² x",
    "a_b  c\td & <|endoftext|> z",
    "e\u0301clair",
    "they'd've i'm #$%'re",
    "the the thing aaaa bababa in  in",
]


def toy() -> ClipTokenizer:
    return ClipTokenizer(MERGES)


def merges_text() -> str:
    return "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in MERGES) + "\n"


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_transformers(text: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPTokenizer(vocab=toy().vocabulary, merges=MERGES)
    assert toy().encode(text) == theirs(text, add_special_tokens=False)["input_ids"]


def test_pairs_are_joined_in_the_order_of_the_list() -> None:
    tokenizer = ClipTokenizer([("a", "b"), ("b", "c</w>"), ("ab", "c</w>")])
    assert tokenizer.encode("abc") == [tokenizer.vocabulary["abc</w>"]]
    assert tokenizer.encode("bbc") == [tokenizer.vocabulary["b"], tokenizer.vocabulary["bc</w>"]]


def test_rows_begin_with_the_start_end_at_the_largest_id_and_are_padded_with_zeros() -> None:
    tokenizer = toy()
    rows = tokenizer(["the", "the video"])
    assert rows.dtype == torch.int64
    assert rows.shape == (2, 77)
    own = [tokenizer.start, *tokenizer.encode("the"), tokenizer.end]
    assert rows[0].tolist() == own + [0] * (77 - len(own))
    assert rows.argmax(-1).tolist() == [2, 1 + len(tokenizer.encode("the video"))]


def test_one_text_is_one_row_and_no_text_no_row() -> None:
    assert toy()("the").shape == (1, 77)
    assert toy()([]).shape == (0, 77)


def test_decode_gives_the_text_back() -> None:
    tokenizer = toy()
    assert tokenizer.decode(tokenizer("playing the violin, 你好!")[0]) == "playing the violin , 你好 !"


def test_words_are_cut_as_clip_cuts_them() -> None:
    assert split_words("Don&amp;t  it's 42!") == ["don", "&", "t", "it", "'s", "4", "2", "!"]


# -- sources --


def test_a_merges_file_plain_or_packed(tmp_path: Path) -> None:
    (tmp_path / "merges.txt").write_text(merges_text())
    (tmp_path / VOCABULARY_FILE).write_bytes(gzip.compress(merges_text().encode()))
    for name in ("merges.txt", VOCABULARY_FILE, ""):
        folder = tmp_path / "folder"
        folder.mkdir(exist_ok=True)
        (folder / VOCABULARY_FILE).write_bytes((tmp_path / VOCABULARY_FILE).read_bytes())
        source = tmp_path / name if name else folder
        assert ClipTokenizer.load(source).encode(TEXTS[0]) == toy().encode(TEXTS[0])


def test_a_file_as_long_as_clips_is_cut_to_its_49408_tokens(tmp_path: Path) -> None:
    lines = "\n".join(f"x{i} y{i}" for i in range(60000))
    (tmp_path / "long.txt").write_text(f"heading\n{lines}\n")
    tokenizer = ClipTokenizer.load(tmp_path / "long.txt")
    assert (len(tokenizer), tokenizer.start, tokenizer.end) == (49408, 49406, 49407)


@pytest.mark.parametrize("form", ["two files", "pairs", "texts"])
def test_a_hugging_face_folder(tmp_path: Path, form: str) -> None:
    if form == "two files":
        (tmp_path / "vocab.json").write_text(json.dumps(toy().vocabulary))
        (tmp_path / "merges.txt").write_text(merges_text())
    else:
        merges = [list(pair) if form == "pairs" else " ".join(pair) for pair in MERGES]
        model = {"type": "BPE", "vocab": toy().vocabulary, "merges": merges}
        (tmp_path / "tokenizer.json").write_text(json.dumps({"padding": {"strategy": {"Fixed": 77}}, "model": model}))
    tokenizer = ClipTokenizer.load(tmp_path)
    assert torch.equal(tokenizer(TEXTS), toy()(TEXTS))


def test_a_folder_that_transformers_saved(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.CLIPTokenizer(vocab=toy().vocabulary, merges=MERGES).save_pretrained(tmp_path)
    assert torch.equal(ClipTokenizer.load(tmp_path)(TEXTS), toy()(TEXTS))


def test_an_installed_open_clip_is_found_without_being_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "__init__.py").write_text("raise ImportError")
    (tmp_path / VOCABULARY_FILE).write_bytes(gzip.compress(merges_text().encode()))
    spec = ModuleSpec("open_clip", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "open_clip" else None)
    assert ClipTokenizer.load().encode("the") == toy().encode("the")


# -- bad input --


@pytest.mark.parametrize("given", ["nothing", "no such path", "a folder of something else"])
def test_a_missing_vocabulary_names_the_three_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    source = {"nothing": None, "no such path": tmp_path / "none.gz", "a folder of something else": tmp_path}[given]
    with pytest.raises(ValueError, match=r"bpe_simple_vocab_16e6.txt.gz.* Hugging Face .*open_clip_torch"):
        ClipTokenizer.load(source)


def test_a_text_longer_than_the_context_is_named() -> None:
    assert toy()("x " * 75).argmax(-1).item() == 76
    with pytest.raises(ValueError, match=r"'x x.*' has 76 tokens.* context of 77"):
        toy()("x " * 76)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x1f\x8bbroken", "no merges file"),
        (b"heading\none two three\n", "line 2: a merge must be two tokens"),
        (b"\xff\xfe\x00", "no merges file"),
    ],
)
def test_a_damaged_merges_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        ClipTokenizer.load(tmp_path / "vocab.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "holds no byte pair encoding"),
        ('{"model": {"vocab": {}, "merges": [["a"]]}}', "merge 0: a merge must be two tokens"),
        ('{"model": {"vocab": {"a": 1}, "merges": []}}', "vocabulary is not CLIP's"),
    ],
)
def test_a_damaged_tokenizer_json_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        ClipTokenizer.load(tmp_path / "tokenizer.json")


def test_a_vocabulary_whose_end_is_not_the_largest_id_is_refused() -> None:
    vocabulary = dict(toy().vocabulary)
    vocabulary[START], vocabulary[END] = vocabulary[END], vocabulary[START]
    with pytest.raises(ValueError, match="largest id"):
        ClipTokenizer(MERGES, vocabulary)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: toy().encode(3), TypeError, "text must be a str"),
        (lambda: ClipTokenizer(MERGES, context=1), ValueError, "context must be at least 2"),
        (lambda: toy().decode([10**6]), ValueError, "ids must be of the vocabulary"),
    ],
    ids=["text", "context", "ids"],
)
def test_bad_arguments(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
