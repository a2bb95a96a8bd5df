"""Marks around the words of messages, put in before rendering and found again in the rendered text."""

import re
from collections.abc import Sequence
from typing import Any

from ain_jax.tokenizer.chat_render import CLOSE, OPEN, Renderer, Span

BEGIN, END, LAST = "\ufdd2", "\ufdd3", "\ufdde"  # a mark is one of the first two, the message's number, and the last
DIGITS = str.maketrans("0123456789", "\ufdd4\ufdd5\ufdd6\ufdd7\ufdd8\ufdd9\ufdda\ufddb\ufddc\ufddd")
NUMBERS = {mark: chr(digit) for digit, mark in DIGITS.items()}
MARK = re.compile(f"([{BEGIN}{END}])([\ufdd4-\ufddd]+){LAST}")
THOUGHT = "</think>"  # behind it stands the answer; many templates leave out what is before it


def generated(raw: str) -> tuple[str, list[Span]]:
    """The rendered text without the template's own markers, and the spans that stood between them."""
    if OPEN not in raw:
        return raw, []
    plain, spans, at = [], [], 0
    for piece in re.split(f"([{OPEN}{CLOSE}])", raw):
        if piece == OPEN:
            spans.append((at, at))
        elif piece == CLOSE:
            spans[-1] = (spans[-1][0], at)
        else:
            plain.append(piece)
            at += len(piece)
    return "".join(plain), spans


def mark(message: dict[str, Any], number: int, outer: bool) -> dict[str, Any]:
    """The message with marks around its words; outer: around the blanks at its edges too.

    Of a message with pictures the first and the last text are marked; one without text stays as it is.
    """
    content, name = message["content"], str(number).translate(DIGITS) + LAST
    answer = message["role"] == "assistant"
    if isinstance(content, str):
        begin, end = _edges(content, outer, answer)
        marked = f"{content[:begin]}{BEGIN}{name}{content[begin:end]}{END}{name}{content[end:]}"
        return {**message, "content": marked}
    texts = [place for place, part in enumerate(content) if "text" in part]
    if not texts:
        return message
    parts = [dict(part) for part in content]
    # The end first: the places before it stay where they are, in the same part too.
    for place, which, sign in ((texts[-1], 1, END), (texts[0], 0, BEGIN)):
        at = _edges(content[place]["text"], outer, answer)[which]
        text = parts[place]["text"]
        parts[place]["text"] = f"{text[:at]}{sign}{name}{text[at:]}"
    return {**message, "content": parts}


def _edges(text: str, outer: bool, answer: bool) -> Span:
    """Where the words of a text begin and end; those of an answer begin behind its thoughts."""
    end = len(text) if outer else len(text.rstrip())
    begin = text.rfind(THOUGHT) + len(THOUGHT) if answer and THOUGHT in text else 0
    if begin or not outer:
        begin = len(text) - len(text[begin:].lstrip())
    return begin, max(begin, end)


def unmark(raw: str) -> tuple[str, dict[int, int], dict[int, int]]:
    """The text without marks, and where the words of each message begin and end in it.

    ValueError where a mark stands twice, since then it says nothing.
    """
    raw = raw.replace(OPEN, "").replace(CLOSE, "")
    begins: dict[int, int] = {}
    ends: dict[int, int] = {}
    removed = 0
    for match in MARK.finditer(raw):
        number, places = int(match.group(2).translate(NUMBERS)), begins if match.group(1) == BEGIN else ends
        if number in places:
            raise ValueError(f"the chat template renders message {number} twice")
        places[number] = match.start() - removed
        removed += match.end() - match.start()
    return MARK.sub("", raw), begins, ends


def rendered_elsewhere(renderer: Renderer, messages: Sequence[dict[str, Any]], number: int) -> bool:
    """Whether the template renders a word put in place of a message: then it changes words, and leaves none out."""
    word = BEGIN + str(number).translate(DIGITS) + LAST
    other = {**messages[number], "content": word}
    try:
        return word in renderer.render([*messages[:number], other, *messages[number + 1 :]])
    except ValueError:
        return False
