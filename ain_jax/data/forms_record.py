"""What an object of our own JSON lines gives, in a Record's types; strict, as such files are written for us."""

from collections.abc import Mapping, Sequence
from typing import Any

from ain_jax.data.files_text import short
from ain_jax.data.formats import IMAGE, Message
from ain_jax.data.forms_media import picture, video
from ain_jax.data.forms_video import Sampling
from ain_jax.experiment import nearest

LINE_KEYS = (
    "id", "source", "language", "kind", "text", "messages", "rejected", "images", "videos", "desirable",
)  # fmt: skip
TEXTS = ("id", "source", "language", "kind", "text", "rejected")


def values(
    value: Mapping[str, Any],
    folder: str,
    members: Mapping[str, bytes] | None = None,
    sampling: Sampling | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """(what the object gives as arguments of Record, all that is wrong with it).

    `text`, or `messages` ([{"role", "content"}]) and perhaps `rejected`, `desirable` (true or false), `images` (paths
    below `folder`, one per "<image>") and `videos` (a list of frames' paths, a folder of them, or a
    video's file, per "<video>").
    """
    value, found = dict(value), []
    found += _key_faults(value, LINE_KEYS)
    for key in TEXTS:
        if key in value and not (isinstance(value[key], str) and value[key].strip()):
            found.append(f"{key} = {short(value.pop(key))}: expected text that is not blank, or no such key")
    messages, images, videos = (value.get(key, []) for key in ("messages", "images", "videos"))
    if not isinstance(messages, list) or ("messages" in value and not messages):
        found.append(f'messages = {short(messages)}: expected a list of {{"role": ..., "content": ...}}')
        messages = []
    if not isinstance(images, list) or not all(isinstance(name, str | bytes) for name in images):
        found.append(f"images = {short(images)}: expected a list of paths")
        images = []
    if not isinstance(videos, list) or not all(isinstance(frames, str | list) for frames in videos):
        found.append(f"videos = {short(videos)}: expected a list of files, of folders, or of lists of frames' paths")
        videos = []
    if not isinstance(value.get("desirable"), bool | None):
        found.append(f"desirable = {short(value.pop('desirable'))}: expected true or false, or no such key")
    turns = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            expected = f'{{"role": text, "content": text}}, with {IMAGE} where a picture stands'
            found.append(f"message {i} = {short(message)}: expected {expected}")
            continue
        found += [f"message {i}: {fault}" for fault in _key_faults(message, ("role", "content"))]
        turns.append(Message(message["role"], message["content"]))
    kept = {key: value[key] for key in (*TEXTS, "desirable") if key in value}
    return kept | {
        "messages": tuple(turns),
        "images": tuple(picture(name, folder, members or {}, found) for name in images),
        "videos": tuple(video(frames, folder, members or {}, found, sampling) for frames in videos),
    }, found


def _key_faults(value: Mapping[str, Any], known: Sequence[str]) -> list[str]:
    return [f"unknown key {key!r}: {nearest(str(key), known)}" for key in value if key not in known]
