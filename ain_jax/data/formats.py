"""The one example type, Record, its checks, and the features that tensorflow-datasets builders write of it."""

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin

from ain_jax.data import drawn

IMAGE = "<image>"  # where a picture stands in a message; the next of the record's pictures takes the place
VIDEO = "<video>"  # likewise for a video
ROLES = ("system", "user", "assistant")
MAX_PIXELS = 40_000_000
MAX_SIDE = 20_000  # pixels
MAX_RATIO = 200  # of the longer side to the shorter: `images.smart_resize` can do no more
# No others are tried: Pillow would start Ghostscript for an EPS file, and read much that no model was shown.
PICTURE_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "PPM", "TIFF", "WEBP")  # a camera's MPO counts as JPEG
_PLUGINS = (TiffImagePlugin, WebPImagePlugin)  # Image.open knows the last two once these are imported
# What a builder stores for a record that has neither videos nor a verdict; `to_example` leaves these keys out then.
NO_MEDIA: Mapping[str, Any] = {"frames": (), "frame_counts": (), "desirable": -1}


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
    videos: tuple[tuple[bytes, ...], ...] = ()  # the frames of each video, encoded files, one video per "<video>"
    desirable: bool | None = None  # KTO's unpaired form: whether the last answer is a good one; elsewhere None


class _RefusedError(Exception):
    """A whole picture that is not read."""


def open_picture(data: bytes, where: str) -> Image.Image:
    """The picture as RGB, transparency on white; a ValueError names `where` if it is no whole picture.

    The contents decide, not the name of the file. Size is read from the head, so that what is too large is never
    decoded. Of an animated file it is the first frame, as transformers takes it. Grey, palette and CMYK pictures are
    converted. Pictures of one channel with more than 8 bits are refused: conversion clips all above 255 to white.
    """
    if drawn.is_drawing(data):
        try:
            return drawn.draw(data)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    if not data:
        raise ValueError(f"{where}: picture of 0 bytes; expected an encoded file such as PNG or JPEG")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes that are refused below, and of odd notes in a file
            picture = Image.open(io.BytesIO(data), formats=PICTURE_FORMATS)
            wrong = size_fault(*picture.size) or _depth_fault(picture.mode)
            if wrong:
                raise _RefusedError(wrong)
            picture.load()
    except UnidentifiedImageError:
        raise ValueError(
            f"{where}: {len(data)} bytes that begin with {data[:8]!r} are no picture; "
            "expected an encoded file such as PNG or JPEG"
        ) from None
    except Image.DecompressionBombError:  # Pillow does not open what has more than 178 million pixels
        told = f"picture of far more than {MAX_PIXELS:,} pixels; at most so many are read: shrink it"
        raise ValueError(f"{where}: {told}") from None
    except _RefusedError as error:
        raise ValueError(f"{where}: {error}") from None
    except Exception as error:  # decoders raise whatever a damaged file leads them to, KeyError and struct.error too
        raise ValueError(
            f"{where}: broken picture of {len(data)} bytes ({str(error) or type(error).__name__}); "
            "replace the file or drop the record"
        ) from None
    if picture.mode == "RGB":
        return picture
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(ground, picture).convert("RGB")
    return picture.convert("RGB")


def size_fault(width: int, height: int) -> str:
    """Why pictures of this size are not read; "" for those that are."""
    size = f"picture of {width} x {height} pixels"
    if width * height > MAX_PIXELS:
        return f"{size}; at most {MAX_PIXELS:,} pixels are read: shrink it"
    if max(width, height) > MAX_SIDE:
        return f"{size}; a side of at most {MAX_SIDE:,} pixels is read: shrink it"
    if max(width, height) > MAX_RATIO * min(width, height):
        return f"{size}; one side may be at most {MAX_RATIO} times the other: cut it"
    return ""


def _depth_fault(mode: str) -> str:
    if mode == "F" or mode.startswith("I"):  # "I", "I;16", "I;16B" ...
        return f"picture of mode {mode!r}, with more than 8 bits a channel, would turn white: save it with 8 bits"
    return ""


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
    films = record.text.count(VIDEO) + sum(m.content.count(VIDEO) for m in record.messages)
    if films != len(record.videos):
        found.append(f'{films} "{VIDEO}" but {_count(len(record.videos), "video")}; each video needs one')
    if record.videos and not record.messages:
        found.append("videos beside plain text are not read; give messages, and the videos in them")
    if IMAGE in record.rejected or VIDEO in record.rejected:
        place = IMAGE if IMAGE in record.rejected else VIDEO
        found.append(f'the rejected answer holds "{place}"; an answer cannot hold a picture')
    if record.desirable is not None and record.messages:
        for place in (IMAGE, VIDEO):
            if place in record.messages[-1].content:
                found.append(f'the judged answer holds "{place}"; an answer cannot hold a picture')
    if record.desirable is not None and roles[-1:] != ["assistant"]:
        found.append(
            "a verdict on the last answer, but the last message is no assistant turn; the answer belongs there"
        )
    if record.desirable is not None and record.rejected:
        found.append("a verdict on the last answer and a rejected answer are both given; keep one")
    found += [f"video {i} has no frames; give one or more" for i, frames in enumerate(record.videos) if not frames]
    if pictures:
        named = [(f"picture {i}", data) for i, data in enumerate(record.images)]
        for i, frames in enumerate(record.videos):
            named += [(f"video {i}, frame {k}", data) for k, data in enumerate(frames)]
        opened: dict[str, tuple[int, int]] = {}
        for name, data in named:
            try:
                opened[name] = open_picture(data, name).size
            except ValueError as error:
                found.append(str(error))
        for i, frames in enumerate(record.videos):
            sizes = [opened.get(f"video {i}, frame {k}") for k in range(len(frames))]
            found += video_faults(f"video {i}", sizes)
    return found


def video_faults(name: str, sizes: Sequence[tuple[int, int] | None]) -> list[str]:
    """What is wrong with a video whose frames have these sizes (None: a broken one): all must have one size."""
    for k, size in enumerate(sizes):
        if size and sizes[0] and size != sizes[0]:
            told = " and ".join(f"frame {i} has {w} x {h} pixels" for i, (w, h) in ((k, size), (0, sizes[0])))
            return [f"{name}: {told}; expected one size for all frames"]
    return []


def validate(record: Record, pictures: bool = True) -> None:
    """Nothing comes back from a sound record; a ValueError names the record and all its faults."""
    found = faults(record, pictures)
    if found:
        raise ValueError(f"record {record.id!r}: " + "; ".join(found))


def to_example(record: Record) -> dict[str, Any]:
    """The record as the features that the dataset builders write.

    A video's frames lie one after another in `frames`, `frame_counts` has one number a video; `desirable` is 1, 0, or
    -1 for None. A record with neither lacks these keys: `{**NO_MEDIA, **to_example(record)}` has them always.
    """
    media = {
        "frames": [frame for video in record.videos for frame in video],
        "frame_counts": [len(video) for video in record.videos],
        "desirable": -1 if record.desirable is None else int(record.desirable),
    }
    return {
        "id": record.id,
        "source": record.source,
        "language": record.language,
        "kind": record.kind,
        "text": record.text,
        "messages": [{"role": m.role, "content": m.content} for m in record.messages],
        "rejected": record.rejected,
        "images": list(record.images),
        **(media if record.videos or record.desirable is not None else {}),
    }


def from_example(example: Mapping[str, Any]) -> Record:
    """The record that `to_example` took apart, from what a reader gives: str or bytes, a dict or a list.

    The keys of NO_MEDIA may be lacking.
    """
    example = {**NO_MEDIA, **example}
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
        videos=videos_of(example["frames"], example["frame_counts"]),
        desirable=None if int(example["desirable"]) < 0 else bool(example["desirable"]),
    )


def videos_of(frames: Sequence[bytes], counts: Sequence[int]) -> tuple[tuple[bytes, ...], ...]:
    """The frames of each video: 5 frames counted (2, 3) make two videos."""
    if sum(counts) != len(frames):
        raise ValueError(f"{len(frames)} frames, but the counts {list(counts)} of the videos say {sum(counts)}")
    left = iter(frames)
    return tuple(tuple(bytes(next(left)) for _ in range(count)) for count in counts)


def _text(value: Any) -> str:
    if isinstance(value, np.ndarray):
        value = value.item()
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
