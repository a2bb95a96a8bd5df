"""Bytes of the pictures and of the videos' frames that a row names, each opened once to know that it is whole."""

import base64
import binascii
import dataclasses
import difflib
import itertools
import os
from collections.abc import Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

from ain_jax.data import drawn
from ain_jax.data.files_text import as_path, is_remote, short
from ain_jax.data.formats import open_picture, video_faults
from ain_jax.data.forms_video import VIDEO_FILES, Sampling, frames, is_video

MAX_FILE = 256 * 2**20  # bytes of a picture's file


def picture(ref: Any, folder: str, members: Mapping[str, bytes], found: list[str]) -> bytes:
    """The encoded picture that `ref` names; what is wrong with it is added to `found`."""
    return _opened(ref, folder, members, found)[0]


def video(
    ref: Any, folder: str, members: Mapping[str, bytes], found: list[str], sampling: Sampling | None = None
) -> tuple[bytes, ...]:
    """The encoded frames of a video: a list of pictures, a folder of them in the order of their names, or a file.

    Of a file those that `sampling` asks for are decoded.
    """
    told = f"video {_name(ref)}"
    if isinstance(ref, Mapping):  # as Hugging Face's datasets stores a video, and as parts of messages name it
        data, name = ref.get("bytes"), next((ref[k] for k in ("path", "url", "video") if ref.get(k) is not None), None)
        ref = bytes(data) if isinstance(data, bytes | bytearray | memoryview) else name
    if isinstance(ref, bytes) or is_video(ref):
        try:
            return frames(_video_file(ref, folder, members), told, sampling or Sampling())
        except ValueError as error:
            found.append(str(error) if told in str(error) else f"{told}: {error}")
            return ()
    if isinstance(ref, str):
        try:
            # Frames lie in no other store: such an address is not even looked up.
            path = None if "://" in ref.removeprefix("gs://") else as_path(_path(ref, folder))
            is_folder = path is not None and path.is_dir()
        except (OSError, ValueError, ImportError) as error:
            found.append(f"{told}: {getattr(error, 'strerror', None) or error}")
            return ()
        if path is None or not is_folder:
            found.append(
                f"{told}: no such folder in {folder or '.'}, and no video's file ({', '.join(sorted(VIDEO_FILES))}); "
                "give a list of its frames as pictures, a folder of them, or a video's file"
            )
            return ()
        ref = [str(frame) for frame in sorted(path.iterdir()) if not frame.name.startswith(".")]
    if not isinstance(ref, list | tuple) or not ref:
        found.append(f"{told}: expected a list of its frames as pictures, or a folder of them; one frame or more")
        return ()
    opened = [_opened(frame, folder, members, found) for frame in ref]
    found += video_faults(told, [size for _, size in opened])
    return tuple(data for data, _ in opened)


def _video_file(ref: str | bytes, folder: str, members: Mapping[str, bytes]) -> str | bytes:
    """The path of a video's file, or its bytes."""
    if isinstance(ref, bytes):
        return ref
    if ref[:7].lower() in ("http://", "https:/"):
        raise ValueError("nothing is fetched from the web; load the file and give its path")
    member = _member(ref, members)
    path = _path(ref, folder)
    if member is None and not is_remote(path) and not os.path.isfile(path):
        raise ValueError(f"no such file in {folder or '.'}{_near(path)}")
    return path if member is None else member


def _opened(
    ref: Any, folder: str, members: Mapping[str, bytes], found: list[str]
) -> tuple[bytes, tuple[int, int] | None]:
    """(bytes, width and height), or None for the size of one that is broken."""
    try:
        if isinstance(ref, Mapping) and ref.get("draw") is not None:
            return _drawn(ref, folder)
        data = _bytes(ref, folder, members)
        return data, open_picture(data, f"picture {_name(ref)}").size
    except ValueError as error:
        found.append(str(error))
        return b"", None


def _drawn(ref: Mapping[str, Any], folder: str) -> tuple[bytes, tuple[int, int]]:
    """(its words, width and height) of a drawing, whose files begin at `folder` and must be there. It is not drawn."""
    try:
        told = drawn.drawing({key: value for key, value in ref.items() if value is not None})
        told = dataclasses.replace(told, **{name: _path(getattr(told, name), folder) for name in told.FILES})
    except ValueError as error:
        raise ValueError(f"drawing {short(dict(ref))}: {error}") from None
    for path in (getattr(told, name) for name in told.FILES):
        if not os.path.isfile(path):
            raise ValueError(f"drawing: no file {path!r}{_near(path)}")
    return drawn.encode(told), (told.width, told.height)


def _bytes(ref: Any, folder: str, members: Mapping[str, bytes]) -> bytes:
    if isinstance(ref, Mapping):  # as Hugging Face's datasets stores a picture
        for key in ("bytes", "path", "url", "image"):
            if ref.get(key) is not None:
                return _bytes(ref[key], folder, members)
    if isinstance(ref, bytes | bytearray | memoryview):
        return bytes(ref)
    if not isinstance(ref, str) or not ref.strip():
        raise ValueError(f"picture {_name(ref)}: expected a path, a data: URL, or an encoded file's bytes")
    if ref[:5].lower() == "data:":
        return _data_url(ref)
    if ref[:7].lower() in ("http://", "https:/"):
        raise ValueError(f"picture {_name(ref)}: nothing is fetched from the web; load the file and give its path")
    member = _member(ref, members)
    return _file(ref, folder) if member is None else member


def _member(ref: str, members: Mapping[str, bytes]) -> bytes | None:
    for name in (ref, ref.removeprefix("./"), os.path.basename(ref)):
        for member, data in members.items():
            if name in (member, member.removeprefix("./"), os.path.basename(member)):
                return data
    return None


def _data_url(ref: str) -> bytes:
    head, comma, body = ref.partition(",")
    try:
        if not comma:
            raise ValueError("no comma")
        return base64.b64decode("".join(body.split()), validate=True) if ";base64" in head else unquote_to_bytes(body)
    except (ValueError, binascii.Error) as error:
        raise ValueError(
            f"picture {_name(ref)}: a broken data: URL ({error}); expected data:image/png;base64,..."
        ) from None


def _path(ref: str, folder: str) -> str:
    ref = unquote(ref[7:]) if ref[:7].lower() == "file://" else ref
    return ref if is_remote(ref) or os.path.isabs(ref) or not folder else f"{folder.rstrip('/')}/{ref}"


def _file(ref: str, folder: str) -> bytes:
    path = _path(ref, folder)
    try:
        if is_remote(path):
            stored = as_path(path)
            if not stored.is_file():
                raise ValueError(f"no picture {_name(ref)} in {folder or '.'}")
            return stored.read_bytes()
        if not os.path.isfile(path):
            raise ValueError(f"no picture {_name(ref)} in {folder or '.'}{_near(path)}")
        size = os.path.getsize(path)
        if size > MAX_FILE:
            raise ValueError(f"picture {_name(ref)}: {size:,} bytes; at most {MAX_FILE:,} are read")
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ValueError(f"picture {_name(ref)}: cannot be read ({error.strerror or error})") from None
    except (ImportError, RuntimeError, TypeError) as error:  # what reaches gs:// and the like is not installed
        raise ValueError(f"picture {_name(ref)}: cannot be read ({error})") from None
    except ValueError as error:
        raise ValueError(str(error) if "picture" in str(error) else f"picture {_name(ref)}: {error}") from None


def _near(path: str) -> str:
    """A clause with the name in the same folder that is most like a missing one."""
    folder, name = os.path.split(path)
    close = difflib.get_close_matches(name[:100], _beside(folder), n=1)
    return f": did you mean {close[0]!r}?" if close else ""


@lru_cache(maxsize=64)  # a set may lack a million pictures of one folder
def _beside(folder: str) -> tuple[str, ...]:
    try:
        with os.scandir(folder or ".") as entries:
            return tuple(entry.name for entry in itertools.islice(entries, 500))
    except OSError:
        return ()


def _name(ref: Any) -> str:
    """How a picture is called in messages."""
    if isinstance(ref, Mapping) and isinstance(ref.get("path"), str):
        ref = ref["path"]
    if isinstance(ref, bytes | bytearray | memoryview):
        return f"of {len(ref)} bytes"
    return repr(ref if len(ref) <= 80 else ref[:77] + "...") if isinstance(ref, str) else short(ref)
