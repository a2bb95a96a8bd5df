"""Answers -> scores: character error rate, accuracy, and the best that one constant answer reaches."""

import unicodedata
from collections import Counter
from collections.abc import Sequence

import jiwer
from rapidfuzz.distance import Levenshtein


def letters(answer: str) -> str:
    """A spelt answer as running text: "ك ت ا ب / ع" -> "كتاب ع"; white space and Unicode forms do not count."""
    words = "".join(unicodedata.normalize("NFC", answer).split()).split("/")
    return " ".join(word for word in words if word)


def plain(answer: str) -> str:
    """A name as compared: one Unicode form, single blanks, lower case, no full stop at its end."""
    return " ".join(unicodedata.normalize("NFC", answer).lower().split()).rstrip(".。۔")


def error_rate(references: Sequence[str], answers: Sequence[str]) -> float:
    """Edits (insertions, deletions, substitutions) per character of the references, over the whole set; jiwer's CER."""
    return float(jiwer.cer(list(references), list(answers)))


def accuracy(references: Sequence[str], answers: Sequence[str]) -> float:
    """The share of answers that are equal to their reference."""
    return sum(r == a for r, a in zip(references, answers, strict=True)) / len(references)


def best_constant(references: Sequence[str], seeds: int = 20) -> tuple[str, float]:
    """The one answer with the fewest edits to all references, and its error rate.

    Searched from the empty answer and the most common references by single edits until none helps; it sees the very
    references it is scored on, which no model does.
    """
    alphabet = [c for c, _ in Counter("".join(references)).most_common(16)]

    def edits(answer: str) -> int:
        return sum(Levenshtein.distance(answer, r) for r in references)

    best, fewest = "", edits("")
    for start in ["", *(r for r, _ in Counter(references).most_common(seeds))]:
        current, cost = start, edits(start)
        while True:
            near = {current[:i] + current[i + 1 :] for i in range(len(current))}
            near |= {current[:i] + c + current[i:] for i in range(len(current) + 1) for c in alphabet}
            near |= {current[:i] + c + current[i + 1 :] for i in range(len(current)) for c in alphabet}
            candidate = min(sorted(near), key=edits)
            if edits(candidate) >= cost:
                break
            current, cost = candidate, edits(candidate)
        if cost < fewest:
            best, fewest = current, cost
    return best, error_rate(references, [best] * len(references))


def most_common(references: Sequence[str]) -> tuple[str, float]:
    """The commonest reference, and the accuracy of always answering it."""
    answer, count = Counter(references).most_common(1)[0]
    return answer, count / len(references)
