"""Rows of instructions and conversations: Alpaca, InstAr, ShareGPT, messages, LLaVA."""

from collections.abc import Mapping
from typing import Any

from ain_jax.data.files_text import short
from ain_jax.data.formats import IMAGE
from ain_jax.data.forms_fields import Draft, end, first, system, text, turns

ASKED = ("instruction", "prompt", "question", "query")
ANSWER = ("output", "response", "completion", "answer")
CONVERSATION = ("conversations", "conversation", "messages", "dialog", "dialogue")


def read_alpaca(values: Mapping[str, Any], draft: Draft) -> None:
    """`instruction`, `input` beneath it, `output`; before them `system` and the pairs of `history`."""
    ask(values, draft)
    draft.say("assistant", text(values, ANSWER, draft))


def ask(values: Mapping[str, Any], draft: Draft) -> None:
    """The turns of an Alpaca row up to its question."""
    system(values, draft)
    history = values.get("history") or []
    if not isinstance(history, list):
        draft.found.append(f"history = {short(history)}: expected a list of [question, answer]")
        history = []
    for i, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(w, str) for w in pair):
            draft.found.append(f"history[{i}] = {short(pair)}: expected [question, answer]")
        elif not all(words.strip() for words in pair):
            draft.found.append(f"history[{i}]: an empty {'question' if pair[1].strip() else 'answer'}")
        else:
            draft.say("user", pair[0])
            draft.say("assistant", pair[1])
    question = text(values, ASKED, draft)
    for name in ASKED:  # one that repeats the other says nothing more: the whole prompt beside its instruction
        other = values.get(name)
        if isinstance(other, str) and not (other.strip() in question or question.strip() in other):
            told = f"{first(values, ASKED)} and {name} hold different questions"
            draft.found.append(f"{told}; join them in one column, or leave one out")
    more = text(values, ("input", "context"), draft, needed=False)
    draft.say("user", f"{question}\n{more}" if more.strip() else question)


def read_instar(values: Mapping[str, Any], draft: Draft) -> None:
    """As Alpaca; `task` becomes the kind, `uuid` the name."""
    read_alpaca(values, draft)
    task = values.get("task")
    if isinstance(task, str) and task.strip():
        draft.kind = "_".join(task.lower().split())[:60]


def read_chat(values: Mapping[str, Any], draft: Draft) -> None:
    """`conversations` or `messages`, before them the row's own `system`; turns after the last answer are left out."""
    system(values, draft)
    if values.get("tools"):
        draft.found.append("tools are not read; write them into the system text, as the model is to see them")
    name = first(values, CONVERSATION)
    if not name:
        draft.found.append("no conversations or messages")
        return
    turns(values[name], name, draft)
    end(draft)


def read_llava(values: Mapping[str, Any], draft: Draft) -> None:
    """As ShareGPT, and a turn's only picture goes on a line before its words, where LLaVA's own loader puts it."""
    read_chat(values, draft)
    draft.turns = [(role, _in_front(words) if words.count(IMAGE) == 1 else words) for role, words in draft.turns]


def _in_front(words: str) -> str:
    return f"{IMAGE}\n{words.replace(IMAGE, '').strip()}".rstrip("\n")
