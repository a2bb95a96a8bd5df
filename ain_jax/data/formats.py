"""The one example type, Record, with its checks and its forms: tensorflow-datasets features, and lines of JSON."""

import difflib
import hashlib
import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ain_jax.experiment import nearest

IMAGE = "<image>"  # where a picture stands in a message; the next of the record's pictures takes the place
ROLES = ("system", "user", "assistant")
MAX_PIXELS = 40_000_000
LINE_KEYS = ("id", "source", "language", "kind", "text", "messages", "rejected", "images")
TOLD = 10  # faults of a file that are written out; of the others the number


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
    if record.images and not record.messages:
        found.append("pictures beside plain text are not read; give messages, and the pictures in them")
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


def read_jsonl(path: Path) -> list[Record]:
    """The records of a file of JSON lines; a ValueError tells what is wrong with each of its lines, as file:line.

    A line is an object with `text`, or with `messages` ([{"role", "content"}]) and perhaps `rejected` and `images`
    (paths relative to the file, one per "<image>"). `id`, `source`, `language` and `kind` may be left out. Blank lines
    are passed over.

        {"messages": [{"role": "user", "content": "<image> What is this?"}, {"role": "assistant", "content": "A cat"}],
         "images": ["cat.png"], "language": "en"}                                  (in the file on one line)
    """
    path = Path(path)
    records, found, first = [], [], {}
    for number, line in _lines(path):
        values, faulty = _line_values(line, path.parent)
        name = values.get("id") or f"{path.name}:{number}"
        if name in first:
            faulty.append(f"id {name!r} stands in line {first[name]} already; every record needs a name of its own")
        first.setdefault(name, number)
        if not faulty:
            default: dict[str, Any] = {
                "source": path.stem,
                "language": "und",
                "kind": "pair" if values.get("rejected") else "example",
            }
            record = Record(**{**default, **values, "id": name})
            faulty = faults(record, pictures=False)  # they have been opened by the name of their file
            records.append(record)
        found += [f"{path}:{number}: {fault}" for fault in faulty]
    if not first:
        raise ValueError(f"{path}: no line that is not blank; expected one JSON object a line")
    if found:
        more = [f"and {len(found) - TOLD} more"] if len(found) > TOLD else []
        raise ValueError("\n".join([*found[:TOLD], *more]))
    return records


def file_mark(path: Path) -> str:
    """A digest that changes with the bytes of a JSON-lines file and of the pictures that it names."""
    digest = hashlib.sha256()
    for _, line in _lines(Path(path)):
        digest.update(line + b"\n")
        try:
            value = json.loads(line)
        except ValueError:
            continue  # `read_jsonl` tells it
        names = value.get("images") if isinstance(value, dict) else None
        for name in names if isinstance(names, list) else ():
            picture = Path(path).parent / str(name)
            digest.update(hashlib.sha256(picture.read_bytes() if picture.is_file() else b"").digest())
    return digest.hexdigest()[:16]


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of each line that is not blank."""
    try:
        data = path.read_bytes()
    except OSError as error:
        beside = sorted(p.name for p in path.parent.glob("*.jsonl"))
        hint = f"; {nearest(path.name, beside)} in {path.parent}" if beside else ""
        raise ValueError(f"{path}: cannot be read ({error.strerror or error}){hint}") from None
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            yield number, line.strip()


def _line_values(line: bytes, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """What a line gives, in a Record's types, and all that is wrong with it."""
    found: list[str] = []

    def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        found.extend(f"the key {key!r} stands more than once" for key in sorted({k for k in keys if keys.count(k) > 1}))
        return dict(pairs)

    try:
        value = json.loads(line.decode("utf-8"), object_pairs_hook=no_key_twice)
    except UnicodeDecodeError as error:
        return {}, [f"not UTF-8 text ({error.reason} at byte {error.start} of the line)"]
    except json.JSONDecodeError as error:
        return {}, [f"not JSON: {error.msg} at character {error.colno} of {_short(line.decode('utf-8'))}"]
    except RecursionError:
        return {}, ["not a record: brackets within brackets without end"]
    if not isinstance(value, dict):
        return {}, [f'expected a JSON object such as {{"text": ...}}, found {_short(value)}']
    found += _key_faults(value, LINE_KEYS)
    for key in ("id", "source", "language", "kind", "text", "rejected"):
        if key in value and not (isinstance(value[key], str) and value[key].strip()):
            found.append(f"{key} = {_short(value.pop(key))}: expected text that is not blank, or no such key")
    messages, images = value.get("messages", []), value.get("images", [])
    if not isinstance(messages, list) or ("messages" in value and not messages):
        found.append(f'messages = {_short(messages)}: expected a list of {{"role": ..., "content": ...}}')
        messages = []
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        found.append(f"images = {_short(images)}: expected a list of paths")
        images = []
    turns = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            expected = f'{{"role": text, "content": text}}, with {IMAGE} where a picture stands'
            found.append(f"message {i} = {_short(message)}: expected {expected}")
            continue
        found += [f"message {i}: {fault}" for fault in _key_faults(message, ("role", "content"))]
        turns.append(Message(message["role"], message["content"]))
    pictures = [_picture(name, folder, found) for name in images]
    kept = {k: value[k] for k in LINE_KEYS if k in value and k not in ("messages", "images")}
    return kept | {"messages": tuple(turns), "images": tuple(pictures)}, found


def _key_faults(value: Mapping[str, Any], known: Sequence[str]) -> list[str]:
    return [f"unknown key {key!r}: {nearest(key, known)}" for key in value if key not in known]


def _picture(name: str, folder: Path, found: list[str]) -> bytes:
    """The bytes of a picture's file; what is wrong with it is added to `found`."""
    path = folder / name
    if not path.is_file():
        beside = [p.name for p in itertools.islice(path.parent.glob("*.*"), 500)]
        close = difflib.get_close_matches(path.name, beside, n=1)
        found.append(f"no picture {name!r} in {folder}" + (f": did you mean {close[0]!r}?" if close else ""))
        return b""
    data = path.read_bytes()
    try:
        open_picture(data, f"picture {name!r}")
    except ValueError as error:
        found.append(str(error))
    return data


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _text(value: Any) -> str:
    if isinstance(value, np.ndarray):
        value = value.item()
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
