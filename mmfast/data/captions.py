"""Captions of labelled clips: a prompt around the name of the class, and the same with words of the name masked."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmfast.data.tokenizer import ClipTokenizer

TEMPLATE = "A video of {}"
IGNORED = -100
MASK_WORD = "mask"  # CLIP's vocabulary has no mask token, so it is the word


class Captions:
    """The prompts of K classes as token ids, whole and masked.

    names: of the classes 0 to K - 1. words: word -> id of the vocabulary that masked words are predicted in (read_words,
    label_words), where a word that it lacks counts as id 0, as published; None where nothing is to be masked. template: "{}"
    stands for the name. share: of a name's words so many are masked, at least one. mask_template: those around the name may be
    masked too, as published.

    class_token_ids: int64 [K, context]. Raises ValueError for an empty name, a template without "{}", a prompt longer than the
    context.
    """

    def __init__(
        self,
        tokenizer: ClipTokenizer,
        names: Sequence[str],
        words: Mapping[str, int] | None = None,
        *,
        template: str = TEMPLATE,
        share: float = 0.2,
        mask_template: bool = False,
    ) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"share must lie in (0, 1], got {share}")
        if isinstance(names, str):
            raise TypeError(f"names must be a sequence of names, got the text {names!r}")
        empty = [i for i, name in enumerate(names) if not name.strip()]
        if empty:
            raise ValueError(f"names must not be empty, the one of class {empty[0]} is")
        before, after = _around(template)
        self.tokenizer, self.words = tokenizer, words
        self.names, self.template, self.share, self.mask_template = list(names), template, share, mask_template
        self._ids: dict[str, list[int]] = {}
        self._prompts = [(before.split(), name.split(), after.split()) for name in names]
        self.class_token_ids = self._rows([self._tokens([*b, *n, *a]) for b, n, a in self._prompts], self.texts())

    def __len__(self) -> int:
        return len(self.names)

    def texts(self) -> list[str]:
        """The prompts."""
        return [self.template.replace("{}", name) for name in self.names]

    def of(self, labels: Sequence[int] | Tensor) -> Tensor:
        """Token ids of the clips' prompts, nothing masked: int64 [B, context]."""
        return self.class_token_ids[torch.tensor(self._checked(labels), dtype=torch.int64)]

    def masked(self, labels: Sequence[int] | Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Token ids of the clips' prompts with words masked, and what was there.

        labels: B class numbers. Returns token_ids int64 [B, context], a masked word being the one token "mask"; mlm_labels int64
        [B, context], at such a token the masked word's id, else -100. Both on the CPU. generator: what words are drawn from.
        """
        if self.words is None:
            raise ValueError("words must be given to mask any: the vocabulary that masked words are predicted in")
        rows, targets, texts = [], [], []
        for label in self._checked(labels):
            ids, found = self._masked(label, generator)
            rows.append(ids)
            targets.append(found)
            texts.append(self.template.replace("{}", self.names[label]))
        mlm_labels = torch.full((len(rows), self.tokenizer.context), IGNORED)
        token_ids = self._rows(rows, texts)
        for row, found in zip(mlm_labels, targets, strict=True):
            for position, word in found.items():
                row[1 + position] = word
        return token_ids, mlm_labels

    def _masked(self, label: int, generator: torch.Generator | None) -> tuple[list[int], dict[int, int]]:
        assert self.words is not None
        before, name, after = self._prompts[label]
        prompt = [*before, *name, *after]
        candidates = range(len(prompt)) if self.mask_template else range(len(before), len(before) + len(name))
        count = max(1, round(len(candidates) * self.share))
        drawn = torch.randperm(len(candidates), generator=generator)[:count].tolist()
        chosen = {candidates[i] for i in drawn}
        ids: list[int] = []
        found: dict[int, int] = {}
        for i, word in enumerate(prompt):
            if i in chosen:
                found[len(ids)] = self.words.get(word.lower(), 0)
            ids += self._tokens([MASK_WORD if i in chosen else word])
        return ids, found

    def _tokens(self, words: Sequence[str]) -> list[int]:
        for word in words:
            if word not in self._ids:
                self._ids[word] = self.tokenizer.encode(word)
        return [i for word in words for i in self._ids[word]]

    def _rows(self, ids: list[list[int]], texts: list[str]) -> Tensor:
        return self.tokenizer.rows(ids, texts)

    def _checked(self, labels: Sequence[int] | Tensor) -> list[int]:
        numbers = labels.tolist() if isinstance(labels, Tensor) else list(labels)
        wrong = [n for n in numbers if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < len(self.names)]
        if wrong:
            raise ValueError(f"labels must be class numbers 0 to {len(self.names) - 1}, got {wrong[0]!r}")
        return numbers


def class_prompts(tokenizer: ClipTokenizer, names: Sequence[str], templates: str | Sequence[str] = TEMPLATE) -> Tensor:
    """Token ids of the classes' prompts: int64 [K, context], or [R, K, context] for a sequence of R templates."""
    if isinstance(templates, str):
        return Captions(tokenizer, names, template=templates).class_token_ids
    if not templates:
        raise ValueError("templates must hold at least one")
    return torch.stack([Captions(tokenizer, names, template=t).class_token_ids for t in templates])


def _around(template: str) -> tuple[str, str]:
    """What stands before and after the name; it must not be glued to it, for words are encoded one by one."""
    parts = template.split("{}")
    if len(parts) != 2 or any(c in "{}" for part in parts for c in part):
        raise ValueError(f'template must hold "{{}}" once, for the name of the class, got {template!r}')
    glue = set(string.whitespace)
    if (parts[0] and parts[0][-1] not in glue) or (parts[1] and parts[1][0].isalnum()):
        raise ValueError(f"template must not glue letters to the name, got {template!r}")
    return parts[0], parts[1]
