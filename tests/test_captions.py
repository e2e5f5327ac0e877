"""Prompts around class names and the masking of their words."""

import pytest
import torch

from mmfast.data.captions import Captions, class_prompts
from mmfast.data.tokenizer import ClipTokenizer
from mmfast.data.video_lists import label_words

NAMES = ["playing violin", "riding a mule", "zumba", "pushing something from left to right of the table now"]


def tokenizer() -> ClipTokenizer:
    return ClipTokenizer([("i", "n"), ("in", "g</w>"), ("m", "a"), ("s", "k</w>"), ("ma", "sk</w>")])


def captions(**options) -> Captions:
    return Captions(tokenizer(), NAMES, label_words(NAMES), **options)


def test_prompts_are_the_texts_encoded_whole() -> None:
    made = captions(template="A clip of {}, seen from afar.")
    assert torch.equal(made.class_token_ids, tokenizer()(made.texts()))
    assert torch.equal(made.of([2, 0]), tokenizer()([made.texts()[2], made.texts()[0]]))


def test_a_masked_word_is_one_token_and_the_rest_stays() -> None:
    words, made = label_words(NAMES), captions()
    ids, labels = made.masked([0] * 50, torch.Generator().manual_seed(0))
    expected = {words["playing"]: "A video of mask violin", words["violin"]: "A video of playing mask"}
    seen = set()
    for row, wanted in zip(ids, labels, strict=True):
        at = (wanted != -100).nonzero().flatten().tolist()
        assert len(at) == 1
        word = int(wanted[at[0]])
        assert torch.equal(row, tokenizer()(expected[word])[0])
        assert row[at[0]] == tokenizer().vocabulary["mask</w>"]
        seen.add(word)
    assert seen == set(expected)


@pytest.mark.parametrize(("label", "count"), [(0, 1), (2, 1), (3, 2)])
def test_a_fifth_of_the_words_is_masked_at_least_one(label: int, count: int) -> None:
    _, labels = captions().masked([label] * 20, torch.Generator().manual_seed(1))
    assert (labels != -100).sum(1).tolist() == [count] * 20


def test_the_template_is_masked_only_where_asked_for() -> None:
    words = label_words([*NAMES, "a video of"])
    start = tokenizer()("A video of")[0].argmax()
    for asked in (False, True):
        made = Captions(tokenizer(), NAMES, words, mask_template=asked)
        _, labels = made.masked([1] * 100, torch.Generator().manual_seed(2))
        assert bool((labels[:, :start] != -100).any()) is asked


def test_a_word_that_the_vocabulary_lacks_has_id_zero() -> None:
    _, labels = Captions(tokenizer(), ["zumba"], {"x": 0, "y": 1}).masked([0])
    assert labels[labels != -100].tolist() == [0]


def test_the_same_generator_masks_the_same_words() -> None:
    made = captions()
    once, again = (made.masked([0, 1, 3] * 5, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(once[0], again[0])
    assert torch.equal(once[1], again[1])


def test_no_clip_gives_no_row() -> None:
    ids, labels = captions().masked([])
    assert ids.shape == labels.shape == (0, 77)


def test_several_templates_give_a_set_each() -> None:
    both = class_prompts(tokenizer(), NAMES, ["A video of {}", "{}"])
    assert torch.equal(both[1], tokenizer()(NAMES))
    assert torch.equal(both[0], class_prompts(tokenizer(), NAMES))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Captions(tokenizer(), ["x " * 80]), ValueError, "context of 77"),
        (lambda: Captions(tokenizer(), ["a", " "]), ValueError, "the one of class 1 is"),
        (lambda: Captions(tokenizer(), "zumba"), TypeError, "sequence of names"),
        (lambda: captions(template="no name"), ValueError, "must hold"),
        (lambda: captions(template="re{}"), ValueError, "must not glue"),
        (lambda: captions(share=0.0), ValueError, "share must lie"),
        (lambda: captions().masked([4]), ValueError, "labels must be class numbers 0 to 3, got 4"),
        (lambda: captions().masked(torch.tensor([-100])), ValueError, "got -100"),
        (lambda: Captions(tokenizer(), NAMES).masked([0]), ValueError, "words must be given"),
        (lambda: class_prompts(tokenizer(), NAMES, []), ValueError, "at least one"),
    ],
    ids=["long", "empty", "text", "template", "glue", "share", "label", "ignored", "words", "templates"],
)
def test_bad_arguments(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
