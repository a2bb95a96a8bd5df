"""Rows of published files -> Records: one reader for each form, what it wants, and which form a row has.

text        {"text": "..."}
parallel    {"ar": "...", "en": "..."}, {"translation": {...}}, source and target
caption     {"image": ..., "caption": "..."}, a WebDataset of .jpg and .txt
alpaca      {"instruction": "...", "input": "...", "output": "...", "system": "...", "history": [...]}
instar      instruction, output, system, task, topic, source, uuid
sharegpt    {"conversations": [{"from": "human", "value": "..."}, ...], "images": [...], "videos": [...]}
llava       the same with "image"
messages    {"messages": [{"role": "user", "content": "..." or [{"type": "image", ...}, ...]}, ...]}
preference  a question with chosen (accepted) and rejected
kto         a question with an answer, and label or kto_tag
record      our own, see `forms_record`
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ain_jax.data import forms_record
from ain_jax.data.files import Row
from ain_jax.data.files_tar import KEY, MEMBERS, PICTURES
from ain_jax.data.formats import IMAGE, VIDEO, Message, Record, faults
from ain_jax.data.forms_chat import ANSWER, ASKED, CONVERSATION, read_alpaca, read_chat, read_instar, read_llava
from ain_jax.data.forms_fields import IDS, IMAGES, LANGUAGES, NEXT, VIDEOS, Draft, first, identity, language_of
from ain_jax.data.forms_media import picture, video
from ain_jax.data.forms_preference import BETTER, is_verdict, read_kto, read_preference
from ain_jax.data.forms_text import (
    CAPTION,
    SIDE_LANGUAGES,
    SIDES,
    TEXT,
    read_caption,
    read_parallel,
    read_text,
    sides,
)
from ain_jax.data.forms_video import Sampling, is_video
from ain_jax.data.languages import is_language
from ain_jax.experiment import nearest

MAX_TEXT = 4 * 2**20  # characters of a record; a longer document is cut by whoever knows where


@dataclass(frozen=True)
class Form:
    read: Callable[[Mapping[str, Any], Draft], None] | None  # None: `forms_record`
    wants: str  # in words, for messages
    columns: tuple[str, ...]  # all that it may read, beside COMMON


COMMON = (*IDS, *LANGUAGES, *IMAGES, *VIDEOS, KEY, MEMBERS)
QUESTION = (*ASKED, "input", "context", "system", "system_prompt", "history")
CHAT = (*CONVERSATION, "system", "system_prompt", "tools")
FORMS: Mapping[str, Form] = {
    "text": Form(read_text, "text", TEXT),
    "parallel": Form(
        read_parallel,
        "two columns of languages such as ar and en, or translation, or source and target",
        ("translation", "translations", *(name for pair in (*SIDES, *SIDE_LANGUAGES) for name in pair)),
    ),
    "caption": Form(read_caption, "image and caption (txt, text)", CAPTION),
    "alpaca": Form(read_alpaca, "instruction and output", (*QUESTION, *ANSWER)),
    "instar": Form(read_instar, "instruction, output and task", (*QUESTION, *ANSWER, "task")),
    "sharegpt": Form(read_chat, "conversations", CHAT),
    "llava": Form(read_llava, "conversations and image", CHAT),
    "messages": Form(read_chat, "messages", CHAT),
    "preference": Form(
        read_preference, "chosen (accepted), rejected and a question", (*BETTER, "rejected", *QUESTION, *CHAT)
    ),
    "kto": Form(read_kto, "prompt, completion and label, or kto_tag", ("label", "kto_tag", *QUESTION, *ANSWER, *CHAT)),
    "record": Form(None, f"our own keys: {', '.join(forms_record.LINE_KEYS)}", forms_record.LINE_KEYS),
}


def columns(form: str, names: Mapping[str, Any] | tuple[str, ...] = ()) -> frozenset[str]:
    """The columns that a form may read, for `files.rows`; of a file's `names`, languages are among them."""
    _known(form)
    more = {name for name in names if is_language(name)} if form == "parallel" else set()
    return frozenset((*FORMS[form].columns, *COMMON, *more))


def detect(values: Mapping[str, Any]) -> str:
    """The form that a row's keys tell; a ValueError lists the keys, and what each form wants, if it is none or several.

    Null columns count as lacking.
    """
    keys = {key for key, value in values.items() if value is not None and isinstance(key, str)}
    found = [form for form, fits in _fits(keys, values).items() if fits]
    if len(found) == 1:
        return found[0]
    told = f"may be {' or '.join(found)}" if found else "are those of no known form"
    wants = "\n".join(f"  {name}: {form.wants}" for name, form in FORMS.items())
    shown = ", ".join(sorted(key for key in keys if not key.startswith("__"))[:40]) or "(none)"
    raise ValueError(f"the keys {shown} {told}; name the form. Each wants:\n{wants}")


def _fits(keys: set[str], values: Mapping[str, Any]) -> dict[str, bool]:
    media = not keys.isdisjoint((*IMAGES, MEMBERS))
    asked = not keys.isdisjoint(ASKED) and not keys.isdisjoint(ANSWER)
    ours = keys <= {*forms_record.LINE_KEYS} and (
        bool(keys & {"kind", "desirable"}) or ({"rejected", "messages"} <= keys and "chosen" not in keys)
    )
    pair = "rejected" in keys and not keys.isdisjoint(BETTER) and not ours
    talks = bool(keys & {"conversations", "conversation"})
    messages = bool(keys & {"messages", "dialog", "dialogue"})
    label = isinstance(values.get("label"), bool | int | str)
    # Beside a conversation a label may be anything, a topic too.
    judges = label and is_verdict(values.get("label")) and (talks or messages)
    verdict = "kto_tag" in keys or judges or (label and {"prompt", "completion"} <= keys)
    judged = ours or pair or verdict
    chat = talks or messages
    llava = bool(keys & {"image", "video"}) or (MEMBERS in keys and "images" not in keys)
    text = not keys.isdisjoint(TEXT) and not asked
    caption = media and not keys.isdisjoint(CAPTION) and not asked and not chat
    return {
        "record": ours,
        "preference": pair,
        "kto": verdict and not pair and not ours,
        "llava": talks and llava and not judged,
        "sharegpt": talks and not llava and not judged,
        "messages": messages and not judged,
        "instar": asked and not judged and bool(keys & {"task", "topic"}),
        "alpaca": asked and not judged and not keys & {"task", "topic"},
        "caption": caption and not judged,
        "text": text and not caption and not judged,
        "parallel": not (judged or asked or chat or text or caption) and len(sides(values)) == 2,
    }


def _known(form: str) -> None:
    if form not in FORMS:
        raise ValueError(f"form {form!r}: no such form; {nearest(form, list(FORMS))}")


def to_record(
    row: Row, form: str, source: str, language: str = "", images: str = "", sampling: Sampling | None = None
) -> Record:
    """The Record of a row; a ValueError names the row and all that is wrong with it.

    `language` is that of rows which tell none ("und" if it is ""). Relative paths of pictures begin at `images`, or at
    the folder of the row's file. A row without a name is called by its place. `sampling` says which frames of a video's
    file are kept.
    """
    _known(form)
    if row.values is None:
        raise ValueError(f"{row.where}: {row.fault or 'no values'}")
    values = {key: value for key, value in row.values.items() if value is not None and isinstance(key, str)}
    members = values.get(MEMBERS)
    members = members if isinstance(members, Mapping) else {}
    folder = images or row.folder
    reader = FORMS[form].read
    if reader is None:
        plain = {key: value for key, value in values.items() if key not in (MEMBERS, KEY)}
        kept, found = forms_record.values(plain, folder, members, sampling)
        kind = "pair" if kept.get("rejected") else "example"
        kept: dict[str, Any] = {"id": row.where, "source": source, "language": language or "und", "kind": kind} | kept
        record = Record(**kept)
    else:
        draft = Draft()
        reader(values, draft)
        pictures, films = _placed(values, draft, members)
        found = draft.found
        record = Record(
            id=identity(values) or row.where,
            source=source,
            language=draft.language or language_of(values) or language or "und",
            kind=draft.kind,
            text=draft.text,
            messages=tuple(Message(role, words) for role, words in draft.turns),
            rejected=draft.rejected,
            images=tuple(picture(ref, folder, members, found) for ref in pictures),
            videos=tuple(video(ref, folder, members, found, sampling) for ref in films),
            desirable=draft.desirable,
        )
    # What a reader found says more than what is wrong with the record that could be made then.
    found = found or faults(record, pictures=False)
    found += _unstorable(record)
    if found:
        raise ValueError(f"{row.where}: " + "; ".join(dict.fromkeys(found)))
    return record


def _column(values: Mapping[str, Any], names: tuple[str, ...]) -> list[Any]:
    value = values.get(first(values, names))
    if isinstance(value, list | tuple):
        return [item for item in value if item is not None]
    return [] if value in (None, "") else [value]


def _placed(values: Mapping[str, Any], draft: Draft, members: Mapping[str, bytes]) -> tuple[list[Any], list[Any]]:
    """The row's pictures and videos in the order of their places, which are made where one is lacking.

    The only picture, or the only video, of a row without a place goes before the first words of the user. LLaVA's
    "<image>" stands for a video in rows that have videos and no pictures.
    """
    pictures = _column(values, IMAGES) or [data for name, data in members.items() if not is_video(name)]
    films = _column(values, VIDEOS) or [{"path": n, "bytes": data} for n, data in members.items() if is_video(n)]
    if films and not any(isinstance(film, list | tuple) for film in films) and _frames(films):
        films = [films]  # the frames of one video
    if films and not pictures and not draft.videos and len(draft.images) == len(films):
        draft.turns = [(role, words.replace(IMAGE, VIDEO)) for role, words in draft.turns]
        draft.images, draft.videos = draft.videos, draft.images
    for place, column, places in ((VIDEO, films, draft.videos), (IMAGE, pictures, draft.images)):
        asked = next((i for i, (role, _) in enumerate(draft.turns) if role == "user"), None)
        if len(column) == 1 and not places and asked is not None:
            draft.turns[asked] = ("user", f"{place}\n{draft.turns[asked][1]}")
            places.append(NEXT)
    return _filled(draft.images, pictures), _filled(draft.videos, films)


def _frames(films: list[Any]) -> bool:
    """Whether these are pictures, not videos."""
    return all(
        isinstance(film, bytes)
        or (isinstance(film, Mapping) and not is_video(film.get("path")))
        or (isinstance(film, str) and (film[:5] == "data:" or film.lower().rpartition(".")[2] in PICTURES))
        for film in films
    )


def _filled(places: list[Any], column: list[Any]) -> list[Any]:
    """The places with the column's items where they are NEXT; what is left over comes last, and is told as too many."""
    left = iter(column)
    filled = [next(left, NEXT) if place is NEXT else place for place in places]
    return [ref for ref in filled if ref is not NEXT] + list(left)


def _unstorable(record: Record) -> list[str]:
    """Texts that are too long, or that no file can hold."""
    texts = [record.text, record.rejected, *(message.content for message in record.messages)]
    found = []
    size = sum(map(len, texts))
    if size > MAX_TEXT:
        found.append(f"{size:,} characters of text; at most {MAX_TEXT:,} are read: cut it into several rows")
    for words in (record.id, record.source, record.language, record.kind, *texts):
        try:
            words.encode("utf-8")
        except UnicodeEncodeError as error:
            found.append(f"half of a surrogate pair in {words[max(0, error.start - 10) : error.start + 10]!r}")
            break
    return found
