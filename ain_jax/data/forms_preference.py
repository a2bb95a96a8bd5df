"""Rows of judged answers: pairs of a better and a worse one, and single answers that are good or bad (KTO)."""

from collections.abc import Mapping
from typing import Any

from ain_jax.data.files_text import short
from ain_jax.data.formats import IMAGE, VIDEO
from ain_jax.data.forms_chat import ANSWER, ASKED, CONVERSATION, ask, read_alpaca, read_chat
from ain_jax.data.forms_fields import Draft, Said, end, first, message, rows_of, system, text, turns

BETTER = ("chosen", "accepted")
TRUE, FALSE = ("true", "1", "good", "yes", "desirable"), ("false", "0", "bad", "no", "undesirable")


def read_preference(values: Mapping[str, Any], draft: Draft) -> None:
    """The question, the better answer as the last turn, the worse one as `rejected`.

    The question is Alpaca's columns, a `prompt` (text or messages) or a conversation up to the answer. Answers
    (`chosen` or `accepted`, and `rejected`) are texts, a message, or lists of messages; lists may repeat the question,
    which is then what both begin with.
    """
    draft.kind = "pair"
    better, worse = (_answer(values, names, draft) for names in (BETTER, ("rejected",)))
    if better is None or worse is None:
        return
    shared = 0
    while shared < min(len(better), len(worse)) - 1 and better[shared] == worse[shared]:
        shared += 1
    if len(better) - shared != 1 or len(worse) - shared != 1:
        told = f"chosen has {len(better) - shared} turns of its own and rejected {len(worse) - shared}"
        draft.found.append(f"{told}; expected them to differ in the last answer alone")
        return
    question = _question(values, draft)
    # Without a question of its own the row has a system text at most: the turns before the answers follow it.
    context = Draft() if question and draft.turns else draft
    for said in better[:shared]:
        if said[1].strip():
            context.say(*said)
    if context is not draft and context.turns:  # the answers repeat what `prompt` says, or its end
        (system_here, here), (system_there, there) = map(_talk, (draft, context))
        longest = min(len(here), len(there))
        if here[-longest:] != there[-longest:] or (system_here and system_there and system_here != system_there):
            draft.found.append("the turns before the answers differ from the prompt; keep one")
        elif len(there) > len(here) or (system_there and not system_here):
            if system_here and not system_there:
                context.turns.insert(0, draft.turns[0])
            if len(here) > len(there):
                draft.turns.insert(0, context.turns[0])
            else:
                draft.turns, draft.images, draft.videos = context.turns, context.images, context.videos
    for name, (role, words, *_) in (("chosen", better[-1]), ("rejected", worse[-1])):
        if role != "assistant":
            draft.found.append(f"{name} ends with a turn of the {role}; expected an answer")
        if not words.strip():
            draft.found.append(f"{name} is empty; expected text that is not blank")
    if not draft.turns:
        draft.found.append(f"no question; expected one of {', '.join((*ASKED, *CONVERSATION))}, or turns before chosen")
    elif draft.turns[-1][0] != "user":
        draft.found.append(f"the turn before the answers is the {draft.turns[-1][0]}'s; expected the user's")
    draft.say("assistant", better[-1][1])
    draft.rejected = worse[-1][1]


def _talk(draft: Draft) -> tuple[str, list[tuple[str, str]]]:
    """(system text, the turns behind it), without blanks around them."""
    told = [(role, words.strip()) for role, words in draft.turns]
    return (told[0][1], told[1:]) if told[:1] and told[0][0] == "system" else ("", told)


def _answer(values: Mapping[str, Any], names: tuple[str, ...], draft: Draft) -> list[Said] | None:
    """The turns of an answer, the answer itself last."""
    name = first(values, names)
    value = values.get(name)
    if not name:
        draft.found.append(f"no {' or '.join(names)}")
        return None
    if isinstance(value, str):
        return [("assistant", value, [], [])]
    if isinstance(value, Mapping) and not all(isinstance(column, list) for column in value.values()):
        value = [value]
    said = [message(turn, f"{name}[{i}]", draft) for i, turn in enumerate(rows_of(value, name, draft))]
    kept = [turn for turn in said if turn is not None]
    for turn in said:
        if turn is not None and any(isinstance(media, list) and media for media in turn[2:]) and turn[0] != "user":
            draft.found.append(f'{name} holds "{IMAGE}" or "{VIDEO}"; an answer cannot hold a picture')
    return kept if kept and len(kept) == len(said) else None


def _question(values: Mapping[str, Any], draft: Draft) -> bool:
    """Whether the row has columns of the question; its turns are added to the draft."""
    if first(values, CONVERSATION) and not first(values, ASKED):
        system(values, draft)
        name = first(values, CONVERSATION)
        turns(values[name], name, draft)
        return True
    name = first(values, ASKED)
    if not name:
        system(values, draft)
        return False
    if isinstance(values[name], str):
        ask(values, draft)
    else:
        system(values, draft)
        turns(values[name], name, draft)
    return True


def is_verdict(value: Any) -> bool:
    """Whether a value says good or bad: true, 0, "desirable" ..."""
    return _word(value) in (*TRUE, *FALSE)


def _word(value: Any) -> str:
    return str(value).strip().lower().removesuffix(".0") if isinstance(value, bool | int | float | str) else ""


def read_kto(values: Mapping[str, Any], draft: Draft) -> None:
    """A question and an answer, or a conversation; `label` or `kto_tag` says whether the last answer is a good one."""
    name = first(values, ("kto_tag", "label"))
    verdict = values.get(name)
    if is_verdict(verdict):
        draft.desirable = _word(verdict) in TRUE
    else:
        draft.found.append(f"{name or 'label'} = {short(verdict)}: expected true or false")
    prompt, answer = values.get("prompt"), values.get("completion")
    if isinstance(prompt, list) or isinstance(answer, list):
        system(values, draft)
        for name in ("prompt", "completion"):
            if isinstance(values.get(name), str):
                draft.say("user" if name == "prompt" else "assistant", text(values, (name,), draft))
            else:
                turns(values.get(name), name, draft)
        end(draft)
    elif first(values, ASKED) and first(values, ANSWER):
        read_alpaca(values, draft)
    else:
        read_chat(values, draft)
    draft.kind = "unpaired"
