"""Judged answers: each beside an answer to another question, laid under its own (KTO's measure of drift).

    question a  answer a  good          a a' : learnt from          a b' : measured
    question b  answer b  bad           b b'                        b c'
    question c  answer c  good          c c'                        c a'

Within a group every answer is used once more, so that the answers measured are distributed as those learnt from
(arXiv 2402.01306, section 4.1). They move on by 1, 2, 4 ... places, until none meets its own question again: rows made
from pairs name each question twice.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from ain_jax.data.encoding import Item
from ain_jax.data.formats import Record

Judged = tuple[Record, int, Item]  # a record with a verdict, its number, and its conversation as one sequence


class Judgements:
    """Gathers judged answers, and gives them back in groups, each with a second sequence."""

    def __init__(self):
        self.waiting: list[Judged] = []
        self.before: list[Judged] = []

    def add(self, record: Record, number: int, item: Item) -> None:
        self.waiting.append((record, number, item))

    def group(self) -> Iterator[Judged]:
        """Those that wait, as soon as they answer two questions or more."""
        stride = _stride(_questions(self.waiting))
        if stride is None:
            return
        self.before, self.waiting = self.waiting, []
        for k, (record, number, item) in enumerate(self.before):
            yield record, number, _beside(item, self.before[k - stride][2])

    def rest(self) -> Iterator[Judged]:
        """Those that wait at the end, with answers of the last group. ValueError: there was none."""
        if self.waiting and not self.before:
            count, name = len(self.waiting), self.waiting[0][0].id
            told = f"{count} answers to one question" if count > 1 else "one answer"
            raise ValueError(
                f"record {name}: the source has verdicts on {told} alone; they are compared with answers to other "
                "questions: add records, or leave the verdicts out"
            )
        for k, (record, number, item) in enumerate(self.waiting):
            own, *questions = _questions([self.waiting[k], *self.before]).tolist()
            others = [other for (_, _, other), question in zip(self.before, questions, strict=True) if question != own]
            yield record, number, _beside(item, others[k % len(others)])
        self.waiting = []


def _answer_at(item: Item) -> int:
    """Where the answer begins: of a judged conversation it alone is learnt."""
    return int(np.argmax(item.sequences[0][1]))


def _questions(judged: Sequence[Judged]) -> np.ndarray:
    """A number for each question, equal where ids and pictures are."""
    numbers: dict[tuple, int] = {}
    keys = [(i.sequences[0][0][: _answer_at(i)].tobytes(), r.images, r.videos) for r, _, i in judged]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)


def _stride(questions_N: np.ndarray) -> int | None:
    """By how many places answers move on, so that as few as can be meet their own question again; None: all would."""
    best, least, stride = None, len(questions_N), 1
    while stride < len(questions_N) and least:
        if (found := int((np.roll(questions_N, stride) == questions_N).sum())) < least:
            best, least = stride, found
        stride *= 2
    return best


def _beside(item: Item, other: Item) -> Item:
    """The conversation, and its question with the other one's answer."""
    own, at, its_at = item.sequences[0], _answer_at(item), _answer_at(other)
    tokens, learn = (
        np.concatenate([mine[:at], its[its_at:]]) for mine, its in zip(own, other.sequences[0], strict=True)
    )
    return dataclasses.replace(item, sequences=[own, (tokens, learn)])
