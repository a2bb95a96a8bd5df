"""What the published forms share: the draft of a record, and how names, languages, roles and turns are read."""

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ain_jax.data.files_tar import KEY
from ain_jax.data.files_text import short
from ain_jax.data.formats import IMAGE, VIDEO
from ain_jax.data.languages import language_code

# Their names for the roles. What a tool says is asked like a user's words; a call of it is learnt like an answer.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "tool": "user",
    "function": "user",
    "observation": "user",
    "tool_response": "user",
    "ipython": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
}
IDS = (
    "id",
    "uuid",
    "uid",
    "_id",
    "qid",
    "prompt_id",
    "question_id",
    "sample_id",
    "conversation_id",
    KEY,
    "idx",
    "index",
)
LANGUAGES = ("language", "lang", "lang_code", "language_code", "locale")
IMAGES = ("images", "image", "image_path", "image_file", "img", "jpg", "jpeg", "png", "webp")
VIDEOS = ("videos", "video")
NEXT = object()  # a place whose picture stands in the row's own column


@dataclass
class Draft:
    """A record in the making: what a form found in a row, and all that is wrong."""

    kind: str = "example"
    language: str = ""
    text: str = ""
    turns: list[tuple[str, str]] = field(default_factory=list)
    rejected: str = ""
    desirable: bool | None = None
    images: list[Any] = field(default_factory=list)  # a picture, or NEXT, for each "<image>" of the turns, in order
    videos: list[Any] = field(default_factory=list)
    found: list[str] = field(default_factory=list)

    def say(self, role: str, content: str, images: Sequence[Any] | None = None, videos: Sequence[Any] | None = None):
        """A turn is added; with the last one's role it is joined to it. Its media are NEXT unless they are given."""
        self.images += [NEXT] * content.count(IMAGE) if images is None else images
        self.videos += [NEXT] * content.count(VIDEO) if videos is None else videos
        if self.turns and self.turns[-1][0] == role:
            content = f"{self.turns.pop()[1]}\n{content}"
        self.turns.append((role, content))


def first(values: Mapping[str, Any], names: Iterable[str]) -> str:
    """The first of the names that the row has a value for, or "". A blank text or an empty list yields to a value."""
    given = [name for name in names if values.get(name) is not None]
    return next((name for name in given if not _blank(values[name])), given[0] if given else "")


def _blank(value: Any) -> bool:
    return not (value.strip() if isinstance(value, str) else value) and isinstance(
        value, str | bytes | list | tuple | Mapping
    )


def text(values: Mapping[str, Any], names: Sequence[str], draft: Draft, needed: bool = True) -> str:
    """The text of the first of these columns; a fault if it is no text, or is lacking or blank and needed."""
    name = first(values, names)
    value = values.get(name, "")
    if not name and needed:
        draft.found.append(f"no {' or '.join(names)}")
        return ""
    if not isinstance(value, str):
        draft.found.append(f"{name} = {short(value)}: expected text")
        return ""
    if needed and not value.strip():
        draft.found.append(f"{name} is empty; expected text that is not blank")
    return value


def identity(values: Mapping[str, Any]) -> str:
    """The row's own name, "" if it has none: 17.0 and 17 give "17"."""
    for name in IDS:
        value = values.get(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, str | int) and not isinstance(value, bool) and abs_small(value):
            return str(value).strip()
    return ""


def abs_small(value: str | int) -> bool:
    """Whether it can be a name: text that is not blank, or a number of no more than 128 bits."""
    return bool(value.strip()) if isinstance(value, str) else value.bit_length() <= 128


def language_of(values: Mapping[str, Any]) -> str:
    value = values.get(first(values, LANGUAGES))
    return language_code(value) if isinstance(value, str) and value.strip() else ""


def rows_of(value: Any, name: str, draft: Draft) -> list[Any]:
    """A list of objects, also where it is stored as JSON text, or as an object of lists."""
    if isinstance(value, str) and value.lstrip()[:1] in "[{":
        with contextlib.suppress(ValueError, RecursionError):  # told below
            value = json.loads(value)
    if isinstance(value, Mapping) and all(isinstance(column, list) for column in value.values()):
        equal = len({len(column) for column in value.values()}) == 1
        value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)] if equal else value
    if isinstance(value, tuple):
        value = list(value)
    if not isinstance(value, list) or not value:
        draft.found.append(f"{name} = {short(value)}: expected a list of turns")
        return []
    return value


def turns(value: Any, name: str, draft: Draft) -> None:
    """The turns of a conversation are added to the draft.

    Turns are {"from", "value"} or {"role", "content"}. Neighbours of one role are joined by a line break; an empty
    system turn is left out. An empty turn of another role and an unknown role are faults.
    """
    for i, turn in enumerate(rows_of(value, name, draft)):
        said = message(turn, f"{name}[{i}]", draft)
        if said is None:
            continue
        role, content, images, videos = said
        if not content.strip():
            if role != "system":
                draft.found.append(f"{name}[{i}]: an empty {'answer' if role == 'assistant' else 'turn'}; drop the row")
            continue
        draft.say(role, content, images, videos)


Said = tuple[str, str, list[Any], list[Any]]  # role, content, pictures and videos of its places


def message(turn: Any, where: str, draft: Draft) -> Said | None:
    """(role, content, pictures, videos) of one turn, None if it is none."""
    if not isinstance(turn, Mapping):
        draft.found.append(f"{where} = {short(turn)}: expected an object with a role and its words")
        return None
    keys = ("from", "value") if turn.get("from") is not None else ("role", "content")
    role, content = turn.get(keys[0]), turn.get(keys[1])
    known = ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None:
        expected = ", ".join(ROLES)
        draft.found.append(f"{where}: role {short(role)}; expected {keys[0]!r} to be one of {expected}")
        return None
    if keys[1] not in turn and not turn.get("tool_calls"):
        draft.found.append(f"{where}: no {keys[1]!r} beside {keys[0]!r}; the turn holds {', '.join(map(str, turn))}")
        return None
    if turn.get("weight") in (0, 0.0) and known == "assistant":
        draft.found.append(f"{where}: weight 0 is not read; which turns are learnt is a setting of the template")
    if turn.get("tool_calls"):
        draft.found.append(
            f"{where}: tool_calls are not read; write the call into the content, as the model is to say it"
        )
        return None
    if content is None:
        content = ""
    if isinstance(content, str):
        return known, content, [NEXT] * content.count(IMAGE), [NEXT] * content.count(VIDEO)
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, list):
        draft.found.append(f"{where}: {keys[1]} = {short(content)}: expected text, or a list of parts")
        return None
    return known, *parts(content, where, draft)


def parts(content: list[Any], where: str, draft: Draft) -> tuple[str, list[Any], list[Any]]:
    """(text, pictures, videos) of a content of parts, as OpenAI's and Qwen2-VL's messages have them.

        [{"type": "image", "image": "cat.png"}, {"type": "text", "text": "What is this?"}]
        gives "<image>What is this?", ["cat.png"] and []

    Parts follow each other as they do in the published templates: nothing is put between them. A part without its
    picture takes the next of the row's column.
    """
    told, images, videos = [], [], []
    for k, part in enumerate(content):
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, Mapping):
            draft.found.append(f"{where}, part {k} = {short(part)}: expected an object such as {{'type': 'text', ...}}")
            continue
        kind = part.get("type")
        kind = kind if isinstance(kind, str) else first(part, ("text", "image", "image_url", "video"))
        if kind in ("text", "input_text", "output_text"):
            words = part.get("text", part.get("content"))
            if not isinstance(words, str):
                draft.found.append(f"{where}, part {k}: text = {short(words)}: expected text")
                continue
            images += [NEXT] * words.count(IMAGE)
            videos += [NEXT] * words.count(VIDEO)
            told.append(words)
        elif kind in ("image", "image_url", "input_image"):
            ref = part.get(first(part, ("image", "image_url", "url", "path", "bytes")), NEXT)
            images.append(ref)
            told.append(IMAGE)
        elif kind in ("video", "video_url"):
            videos.append(part.get(first(part, ("video", "video_url", "frames", "url", "path")), NEXT))
            told.append(VIDEO)
        else:
            draft.found.append(f"{where}, part {k}: type {short(kind)}; expected text, image, image_url or video")
    return "".join(told), images, videos


def system(values: Mapping[str, Any], draft: Draft) -> None:
    """The row's own system text comes first, unless it is blank."""
    name = first(values, ("system", "system_prompt"))
    if name and text(values, (name,), draft, needed=False).strip():
        draft.say("system", values[name])


def end(draft: Draft) -> None:
    """Turns behind the last answer go: nothing in them is learnt. It is a fault if pictures stand in them."""
    while draft.turns and draft.turns[-1][0] == "user" and any(role == "assistant" for role, _ in draft.turns):
        _, content = draft.turns.pop()
        if IMAGE in content or VIDEO in content:
            draft.found.append(
                "the last turn shows a picture or video and has no answer; give the answer, or drop the turn"
            )
