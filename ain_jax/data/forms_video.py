"""Frames of a video's file, sampled evenly in time. Decoding needs the extra `ain_jax[video]` (PyAV, FFmpeg's library).

30 frames a second for 4 seconds, fps 2    frames 0 15 30 45 60 75 90 105
the same with max_frames 4                 frames 0 30 60 90
"""

import contextlib
import importlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ain_jax.data.files_text import as_path, file_size, is_remote
from ain_jax.data.formats import size_fault

VIDEO_FILES = frozenset((".mp4", ".mkv", ".avi", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv"))
QUALITY = 95  # of the frames' JPEG files, colours kept at full size
USUAL_RATE = 25  # frames a second of a file that tells neither times nor a rate
LONGEST = 24 * 3600  # seconds; times beyond are a damaged head


@dataclass(frozen=True)
class Sampling:
    """Which frames of a video's file are kept; lists and folders of frames are kept whole."""

    fps: float = 2.0  # frames a second, as Qwen2-VL was trained; tokens_per_second of its positions goes by it
    max_frames: int = 768  # of a longer video so many, spread evenly over its length

    def __post_init__(self):
        if not 0 < self.fps <= 1000 or self.max_frames < 1:
            raise ValueError(
                f"fps = {self.fps} and max_frames = {self.max_frames}: expected frames a second above 0, and 1 or more"
            )


def is_video(name: Any) -> bool:
    """Whether a file's name ends as videos' do."""
    return isinstance(name, str) and os.path.splitext(name)[1].lower() in VIDEO_FILES


def frames(file: str | bytes, told: str, sampling: Sampling) -> tuple[bytes, ...]:
    """JPEG files of a video's frames; a ValueError names `told` where the file is no whole video or PyAV is not there.

    file: a path, or the bytes of the file
    """
    try:
        av: Any = importlib.import_module("av")
    except ImportError:
        raise ValueError(
            f"{told}: files of videos are decoded by PyAV: pip install ain_jax[video]; "
            "or give a list of the frames as pictures, or a folder of them"
        ) from None
    av.logging.set_level(None)  # what FFmpeg remarks on a damaged file is told by the exception
    try:
        with _opened(file, told) as source:
            times_F = _times(av, source, told)
        wanted = _wanted(times_F, sampling)
        found, decoded = _decoded(av, file, told, wanted)
        if len(found) < len(wanted):  # packets that show nothing were counted too, as VP8's hidden frames
            if not decoded or decoded < len(times_F) // 2:
                raise ValueError(f"{told}: {decoded} of {len(times_F)} frames can be decoded; get the file again")
            wanted = _wanted(times_F[:decoded], sampling)
            found, _ = _decoded(av, file, told, wanted)
    except (av.FFmpegError, OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(f"{told}: broken video ({reason}); replace the file or drop the record") from None
    return tuple(found)


@contextlib.contextmanager
def _opened(file: str | bytes, told: str) -> Iterator[Any]:
    if isinstance(file, str) and not os.path.isfile(file) and not is_remote(file):
        raise ValueError(f"{told}: no such file")
    size = len(file) if isinstance(file, bytes) else file_size(file)
    if not size:
        raise ValueError(f"{told}: video of 0 bytes; expected an encoded file such as MP4 or WebM")
    if isinstance(file, bytes):
        yield io.BytesIO(file)
    elif is_remote(file):
        with as_path(file).open("rb") as source:
            yield source
    else:
        yield file


@contextlib.contextmanager
def _stream(av: Any, source: Any, told: str) -> Iterator[tuple[Any, Any]]:
    """(container, its first stream of pictures)."""
    with av.open(source, metadata_errors="ignore") as container:
        if not container.streams.video:
            raise ValueError(f"{told}: a file without pictures; expected a video")
        stream = container.streams.video[0]
        wrong = size_fault(stream.codec_context.width, stream.codec_context.height)
        if wrong:
            raise ValueError(f"{told}: {wrong}")
        yield container, stream


def _times(av: Any, source: Any, told: str) -> np.ndarray:
    """(F,) float64: the seconds at which the frames are shown, in order, from their packets; nothing is decoded."""
    with _stream(av, source, told) as (container, stream):
        rate = float(stream.average_rate or USUAL_RATE)
        stamps = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_corrupt]
        if not stamps:
            raise ValueError(f"{told}: a video without frames; give one or more")
        if None in stamps or stream.time_base is None:
            return np.arange(len(stamps)) / rate
        times_F = np.sort(np.array(stamps, np.float64)) * float(stream.time_base)
    times_F -= times_F[0]
    return times_F if times_F[-1] <= LONGEST else np.arange(len(times_F)) / rate


def _wanted(times_F: np.ndarray, sampling: Sampling) -> list[int]:
    """The numbers of the frames to keep: those shown at even times."""
    step = times_F[-1] / (len(times_F) - 1) if len(times_F) > 1 else 0.0
    seconds = times_F[-1] + step
    count = min(max(round(seconds * sampling.fps), 1), sampling.max_frames, len(times_F))
    at = np.arange(count) * seconds / count
    shown = np.searchsorted(times_F, at + step / 1000, side="right").clip(1) - 1
    return np.unique(shown).tolist()


def _decoded(av: Any, file: str | bytes, told: str, wanted: list[int]) -> tuple[list[bytes], int]:
    """(files of the wanted frames, how many frames were decoded to come by them)."""
    found, number, size = [], 0, None
    with _opened(file, told) as source, _stream(av, source, told) as (container, stream):
        stream.thread_type = "NONE"  # sources are read in many processes already
        for frame in container.decode(stream):
            if number == wanted[len(found)]:
                picture = frame.to_image()
                if picture.size != (size := size or picture.size):  # a stream may change its size
                    picture = picture.resize(size)
                data = io.BytesIO()
                picture.save(data, "JPEG", quality=QUALITY, subsampling=0)
                found.append(data.getvalue())
            number += 1
            if len(found) == len(wanted):
                break
    return found, number
