"""The one example type, Record, with its checks and its form as tensorflow-datasets features."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

IMAGE = "<image>"  # where a picture stands in a message; the next of the record's pictures takes the place
ROLES = ("system", "user", "assistant")
MAX_PIXELS = 40_000_000


@dataclass(frozen=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True)
class Record:
    """One example: text to continue, or a conversation with pictures, perhaps with a worse last answer."""

    id: str
    source: str  # "handbook", "read", "emoji" ...
    language: str  # "ar", "en", "arz", "ary", "arq"; "ar-en" for parallel text
    kind: str  # a label inside the source: "word", "line", "name", "wrong_language" ...
    text: str = ""  # plain text to continue; empty when messages are given
    messages: tuple[Message, ...] = ()
    rejected: str = ""  # the worse last answer of a preference pair; the better one is the last message
    images: tuple[bytes, ...] = ()  # encoded files, one per "<image>", in order


def open_picture(data: bytes, where: str) -> Image.Image:
    """The picture as RGB, transparency on white; a ValueError names `where` if it is no whole picture."""
    if not data:
        raise ValueError(f"{where}: picture of 0 bytes; expected an encoded file such as PNG or JPEG")
    try:
        picture = Image.open(io.BytesIO(data))
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(
                f"{where}: picture of {picture.width} x {picture.height} pixels; "
                f"at most {MAX_PIXELS:,} pixels are read: shrink it"
            )
        picture.load()
    except UnidentifiedImageError:
        raise ValueError(
            f"{where}: {len(data)} bytes that begin with {data[:8]!r} are no picture; "
            "expected an encoded file such as PNG or JPEG"
        ) from None
    except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{where}: broken picture of {len(data)} bytes ({error}); replace the file or drop the record"
        ) from None
    if picture.mode == "RGB":
        return picture
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(ground, picture).convert("RGB")
    return picture.convert("RGB")


def faults(record: Record, pictures: bool = True) -> list[str]:
    """All that is wrong with a record, one line each; none when it is sound. `pictures=False` opens none."""
    found = []
    roles = [message.role for message in record.messages]
    if not record.id:
        found.append("empty id; every record needs a name of its own")
    if bool(record.text) == bool(record.messages):
        found.append("text and messages are both " + ("given; keep one" if record.text else "empty; one is needed"))
    for i, role in enumerate(roles):
        if role not in ROLES:
            found.append(f"message {i}: role {role!r}; expected one of {', '.join(ROLES)}")
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not found:
        for i, role in enumerate(turns, start=len(roles) - len(turns)):
            expected = "user" if (i - len(roles) + len(turns)) % 2 == 0 else "assistant"
            if role != expected:
                found.append(f"message {i}: role {role!r}; expected {expected!r}: user and assistant take turns")
                break
    if record.messages and not any(m.role == "assistant" and m.content.strip() for m in record.messages):
        found.append(f"no assistant turn with content among the roles {roles}; there would be nothing to learn from")
    if record.rejected and roles[-1:] != ["assistant"]:
        found.append("a rejected answer, but the last message is no assistant turn; the better answer belongs there")
    if record.rejected and record.messages and record.rejected == record.messages[-1].content:
        found.append(f"the rejected answer {record.rejected[:40]!r} equals the better one")
    places = record.text.count(IMAGE) + sum(m.content.count(IMAGE) for m in record.messages)
    if places != len(record.images):
        found.append(f'{places} "{IMAGE}" but {_count(len(record.images), "picture")}; each picture needs one')
    if IMAGE in record.rejected:
        found.append(f'the rejected answer holds "{IMAGE}"; an answer cannot hold a picture')
    if pictures:
        for i, data in enumerate(record.images):
            try:
                open_picture(data, f"picture {i}")
            except ValueError as error:
                found.append(str(error))
    return found


def validate(record: Record, pictures: bool = True) -> None:
    """Nothing comes back from a sound record; a ValueError names the record and all its faults."""
    found = faults(record, pictures)
    if found:
        raise ValueError(f"record {record.id!r}: " + "; ".join(found))


def to_example(record: Record) -> dict[str, Any]:
    """The record as the features that the dataset builders write."""
    return {
        "id": record.id,
        "source": record.source,
        "language": record.language,
        "kind": record.kind,
        "text": record.text,
        "messages": [{"role": m.role, "content": m.content} for m in record.messages],
        "rejected": record.rejected,
        "images": list(record.images),
    }


def from_example(example: Mapping[str, Any]) -> Record:
    """The record that `to_example` took apart, from what a reader gives: str or bytes, a dict or a list."""
    messages = example["messages"]
    if isinstance(messages, Mapping):  # tensorflow-datasets gives a sequence of dicts as a dict of sequences
        pairs = list(zip(messages["role"], messages["content"], strict=True))
    else:
        pairs = [(m["role"], m["content"]) for m in messages]
    return Record(
        id=_text(example["id"]),
        source=_text(example["source"]),
        language=_text(example["language"]),
        kind=_text(example["kind"]),
        text=_text(example["text"]),
        messages=tuple(Message(_text(role), _text(content)) for role, content in pairs),
        rejected=_text(example["rejected"]),
        images=tuple(bytes(data) for data in example["images"]),
    )


def _text(value: Any) -> str:
    if isinstance(value, np.ndarray):
        value = value.item()
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
