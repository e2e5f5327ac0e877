"""CLIP's byte pair encoding. The vocabulary is not shipped: it is a file or folder of yours, or the installed open_clip's.

A text is lower-cased and cut into words: contractions, runs of letters, single digits, runs of what is left. A word is its
UTF-8 bytes, the last one marked as an end; the pair of neighbours that comes first in the list of merges is joined, again
and again, until none is in the list.
"""

from __future__ import annotations

import functools
import gzip
import html
import importlib.util
import json
import os
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CONTEXT = 77
START, END = "<|startoftext|>", "<|endoftext|>"
VOCABULARY_FILE = "bpe_simple_vocab_16e6.txt.gz"
_END_OF_WORD = "</w>"
_MERGES = 49152 - 256 - 2  # CLIP takes so many of the file's 262144
_SUFFIXES = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
_THREE_WAYS = (
    f"give a path to CLIP's {VOCABULARY_FILE}, or a folder of a Hugging Face CLIP tokenizer (vocab.json and merges.txt, or "
    "tokenizer.json), or install open_clip_torch, whose own copy is then found"
)


class ClipTokenizer:
    """Texts to rows of token ids: the start, the text's tokens, the end (the largest id), zeros up to `context`.

    merges: pairs of tokens, the one to be joined first first. vocabulary: token -> id; by default CLIP's order, the 256
    bytes, the 256 bytes at a word's end, the merges, start and end.
    """

    def __init__(
        self, merges: Sequence[tuple[str, str]], vocabulary: Mapping[str, int] | None = None, context: int = CONTEXT
    ) -> None:
        if context < 2:
            raise ValueError(f"context must be at least 2 (the start and the end), got {context}")
        symbols = list(_byte_symbols().values())
        if vocabulary is None:
            joined = ["".join(pair) for pair in merges]
            tokens = [*symbols, *(s + _END_OF_WORD for s in symbols), *joined, START, END]
            vocabulary = {token: i for i, token in enumerate(tokens)}
        lacking = [t for t in (START, END, *symbols, *(s + _END_OF_WORD for s in symbols)) if t not in vocabulary]
        if lacking:
            raise ValueError(
                f"vocabulary is not CLIP's: it has no {lacking[0]!r}, and lacks {len(lacking)} such tokens"
            )
        self.context = context
        self.vocabulary = dict(vocabulary)
        self.start, self.end = self.vocabulary[START], self.vocabulary[END]
        if max(self.vocabulary.values()) != self.end:
            raise ValueError(f"vocabulary must give {END} the largest id, by which CLIP finds it; it has {self.end}")
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._words: dict[str, list[int]] = {START: [self.start], END: [self.end]}
        self._texts = {i: token for token, i in self.vocabulary.items()}

    @classmethod
    def load(cls, source: str | os.PathLike[str] | None = None, context: int = CONTEXT) -> ClipTokenizer:
        """From CLIP's merges file (.txt or .txt.gz), a Hugging Face tokenizer folder, or an installed open_clip (None).

        Raises ValueError where there is no vocabulary, saying the three ways to give one, and for a file that is none.
        """
        if source is None:
            return cls(_read_merges(_open_clip_file()), context=context)
        path = Path(source)
        if not path.exists():
            raise ValueError(f"no vocabulary at {str(path)!r}: {_THREE_WAYS}")
        if path.is_dir():
            return _from_folder(path, context)
        if path.name == "tokenizer.json":
            return _from_folder(path.parent, context)
        return cls(_read_merges(path), context=context)

    def __len__(self) -> int:
        return self.end + 1

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Token ids of texts: int64 [L, context], on the CPU. ValueError for a text longer than the context."""
        texts = [texts] if isinstance(texts, str) else texts
        return self.rows([self.encode(text) for text in texts], texts)

    def encode(self, text: str) -> list[int]:
        """The ids of a text's own tokens, without start and end."""
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, got {type(text).__name__}")
        return [i for word in split_words(text) for i in self._ids(word)]

    def rows(self, ids: Sequence[Sequence[int]], texts: Sequence[str]) -> Tensor:
        """int64 [L, context]: lists of ids between start and end, padded with 0. ValueError naming the text that is too long."""
        out = torch.zeros(len(ids), self.context, dtype=torch.int64)
        for row, own, text in zip(out, ids, texts, strict=True):
            if len(own) + 2 > self.context:
                raise ValueError(
                    f"text {text!r} has {len(own)} tokens, which with start and end must fit the context of {self.context}"
                )
            row[: len(own) + 2] = torch.tensor([self.start, *own, self.end])
        return out

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of token ids; what stands from the end on, and the start, is left out."""
        numbers = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        numbers = numbers[: numbers.index(self.end)] if self.end in numbers else numbers
        unknown = [i for i in numbers if i not in self._texts]
        if unknown:
            raise ValueError(f"ids must be of the vocabulary's {len(self)} tokens, got {unknown[0]}")
        joined = "".join(self._texts[i] for i in numbers if i != self.start).replace(_END_OF_WORD, " ")
        bytes_of = {symbol: byte for byte, symbol in _byte_symbols().items()}
        raw = bytearray(b for c in joined for b in ([bytes_of[c]] if c in bytes_of else c.encode()))
        return raw.decode("utf-8", errors="replace").strip()

    def _ids(self, word: str) -> list[int]:
        if word not in self._words:
            symbols = _byte_symbols()
            letters = [symbols[byte] for byte in word.encode("utf-8")]
            letters[-1] += _END_OF_WORD
            self._words[word] = [self.vocabulary[part] for part in self._merged(letters)]
        return self._words[word]

    def _merged(self, parts: list[str]) -> list[str]:
        while len(parts) > 1:
            pairs = list(zip(parts, parts[1:], strict=False))
            best = min(pairs, key=lambda pair: self._ranks.get(pair, len(self._ranks)))
            if best not in self._ranks:
                break
            joined: list[str] = []
            at = 0
            while at < len(parts):
                if tuple(parts[at : at + 2]) == best:
                    joined.append("".join(best))
                    at += 2
                else:
                    joined.append(parts[at])
                    at += 1
            parts = joined
        return parts


def split_words(text: str) -> list[str]:
    """A text cleaned as CLIP's is (HTML entities, NFC, blanks, lower case) and cut into the words that are encoded alone.

    Broken encodings are not repaired, as open_clip does where ftfy is installed.
    """
    text = unicodedata.normalize("NFC", html.unescape(html.unescape(text)))
    text = " ".join(text.split()).lower()
    words, at = [], 0
    while at < len(text):
        end = _word_end(text, at)
        if end > at:
            words.append(text[at:end])
        at = max(end, at + 1)
    return words


def _word_end(text: str, at: int) -> int:
    """Where the word that starts here ends; here itself for a blank."""
    for special in (START, END, *_SUFFIXES):
        if text.startswith(special, at):
            return at + len(special)
    kind = _kind(text[at])
    if kind in ("blank", "digit"):
        return at + (kind == "digit")
    end = at + 1
    while end < len(text) and _kind(text[end]) == kind:
        end += 1
    return end


def _kind(char: str) -> str:
    if char.isspace():
        return "blank"
    return {"L": "letter", "N": "digit"}.get(unicodedata.category(char)[0], "sign")


@functools.cache
def _byte_symbols() -> dict[int, str]:
    """byte -> the visible character that stands for it in the vocabulary: itself if it is one, else one from 256 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def _open_clip_file() -> Path:
    found = importlib.util.find_spec("open_clip")
    path = Path(found.origin).with_name(VOCABULARY_FILE) if found is not None and found.origin else None
    if path is None or not path.is_file():
        raise ValueError(f"no BPE vocabulary: {_THREE_WAYS}")
    return path


def _read_merges(path: Path) -> list[tuple[str, str]]:
    """The pairs of a merges file, behind its first line, which is a heading."""
    raw = _read(path)
    try:
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is no merges file, nor one packed with gzip ({error})") from None
    lines = text.split("\n")[1 : 1 + _MERGES]
    return [_pair(line.split(), f"{path}: line {n}") for n, line in enumerate(lines, 2) if line.strip()]


def _from_folder(folder: Path, context: int) -> ClipTokenizer:
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return ClipTokenizer(_read_merges(folder / "merges.txt"), _read_ids(folder / "vocab.json"), context)
    if (folder / "tokenizer.json").is_file():
        model = _read_json(folder / "tokenizer.json").get("model")
        if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict) or "merges" not in model:
            raise ValueError(f"{folder / 'tokenizer.json'}: holds no byte pair encoding (model.vocab and model.merges)")
        pairs = [m.split() if isinstance(m, str) else m for m in model["merges"]]
        merges = [_pair(pair, f"{folder / 'tokenizer.json'}: merge {n}") for n, pair in enumerate(pairs)]
        return ClipTokenizer(merges, model["vocab"], context)
    if (folder / VOCABULARY_FILE).is_file():
        return ClipTokenizer(_read_merges(folder / VOCABULARY_FILE), context=context)
    raise ValueError(f"{folder}: holds no CLIP vocabulary: {_THREE_WAYS}")


def _pair(parts: Any, where: str) -> tuple[str, str]:
    if not isinstance(parts, (list, tuple)) or len(parts) != 2:
        raise ValueError(f"{where}: a merge must be two tokens, got {parts!r}")
    return parts[0], parts[1]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None


def _read_json(path: Path) -> dict[str, Any]:
    raw = _read(path)
    try:
        data = json.loads(raw)
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error})") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(data).__name__}")
    return data


def _read_ids(path: Path) -> dict[str, int]:
    ids = _read_json(path)
    wrong = [token for token, i in ids.items() if isinstance(i, bool) or not isinstance(i, int)]
    if wrong:
        raise ValueError(f"{path}: the id of {wrong[0]!r} must be a whole number, got {ids[wrong[0]]!r}")
    return ids
