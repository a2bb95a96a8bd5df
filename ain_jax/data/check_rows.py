"""What the data check shows of a stage: its sources measured, some of their examples token by token, a packed row."""

import codecs
import dataclasses
import io
from collections.abc import Collection, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from ain_jax.data import check_faults, drawn, visuals
from ain_jax.data.check_faults import Fault
from ain_jax.data.examples import Examples, PictureSettings
from ain_jax.data.formats import Record
from ain_jax.data.rows import Rows
from ain_jax.tokenizer import display
from ain_jax.tokenizer.align import Spelling, spellings

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
LONGEST = 3  # ids told
VERDICTS = ("bad", "good")


@dataclasses.dataclass(frozen=True)
class Piece:
    """What the reader sees as one: a token, or the tokens that only together are whole characters."""

    text: str
    ids: tuple[int, ...]
    learnt: bool
    kind: Literal["text", "special", "picture"] = "text"

    @property
    def label(self) -> str:
        """What stands on the screen for it; of a picture the number of places it takes."""
        places = len(self.ids)
        return self.text if self.kind != "picture" else f"picture, {places} place{'s' if places > 1 else ''}"


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture of an example."""

    width: int  # pixels
    height: int
    form: str  # "PNG"; of a video the number of its frames, too
    grid: tuple[int, ...]  # frames or tiles, rows and columns of patches
    data: bytes


@dataclasses.dataclass(frozen=True)
class Shown:
    """One example as it is learnt: one sequence, the better and the worse answer of a pair, or a judged answer and
    the one to another question that is measured beside it."""

    id: str
    group: str
    sequences: tuple[tuple[str, tuple[Piece, ...]], ...]  # ("better", its pieces)
    pictures: tuple[Picture, ...]


@dataclasses.dataclass(frozen=True)
class Counts:
    """One language of a source, or the whole of it."""

    group: str
    examples: int
    tokens: int
    learnt: int
    pictures: int
    patches: int


@dataclasses.dataclass(frozen=True)
class SourceReport:
    """All about one source of a stage."""

    name: str
    counts: tuple[Counts, ...]  # by language, the whole last
    lengths: tuple[int, ...]  # tokens of an example at each of QUANTILES
    longest: tuple[tuple[str, int], ...]
    shown: tuple[Shown, ...]
    faults: tuple[Fault, ...]
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Placed:
    """One segment of a packed row."""

    number: int
    source: str
    id: str
    first: int  # place of its first token
    tokens: int
    learnt: int
    patches: int


@dataclasses.dataclass(frozen=True)
class RowReport:
    """One row of a stage's plan as it is laid."""

    index: int
    rows: int
    used: tuple[int, int, int]  # tokens, patches, targets
    budgets: tuple[int, int, int]
    segments: tuple[Placed, ...]
    filled: float  # of all rows
    best: float


def pieces(
    tokens: Sequence[int] | np.ndarray,
    learn: Sequence[bool] | np.ndarray,
    spelled: Sequence[Spelling | None],
    seen: Collection[int | None],
) -> list[Piece]:
    """The ids as what they spell, all of them, in order: tokens that are no whole character are joined.

    `seen` are the ids at whose places pictures and videos stand; the places of one are one piece. Bytes that never
    become a character are shown as <D8>.
    """
    found: list[Piece] = []
    held: list[int] = []  # the tokens of a character that is not whole yet
    data = b""

    def close() -> None:
        nonlocal data
        if held:
            text = display.shown_bytes(data) if display.is_partial(data) else data.decode("utf-8")
            found.append(Piece(text, tuple(int(tokens[i]) for i in held), any(bool(learn[i]) for i in held)))
        held.clear()
        data = b""

    for i, token in enumerate(tokens):
        token = int(token)
        spelling = spelled[token] if token < len(spelled) else None
        if token in seen and found and not held and found[-1].ids[-1] == token:
            found[-1] = dataclasses.replace(found[-1], ids=(*found[-1].ids, token))
        elif token in seen or spelling is None or spelling.special:
            close()
            name = spelling.special if spelling else f"<id {token} is no token>"
            kind = "picture" if token in seen else "special"
            found.append(Piece(name, (token,), bool(learn[i]), kind))
        else:
            held.append(i)
            data += spelling.text
            if not _begun(data):
                close()
    close()
    return found


def _begun(data: bytes) -> bool:
    """Whether the bytes end inside a character that further bytes may complete."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        decoder.decode(data)
    except UnicodeDecodeError:
        return False
    return bool(decoder.getstate()[0])


def spell(tokenizer: Any) -> list[Spelling | None]:
    """What each id of a transformers tokenizer stands for."""
    return spellings(tokenizer.backend_tokenizer)


def counts(examples: Examples) -> tuple[Counts, ...]:
    """Examples, tokens, learnt tokens, pictures and patches by language, and of the whole source last."""
    sizes_E3, group_E = np.asarray(examples.sizes()), np.asarray(examples.group_E)
    starts_E = np.asarray(examples.grid_starts_S)[np.asarray(examples.first_E)]
    pictures_E = np.diff(starts_E)
    names = [*examples.groups, "all"]
    result = []
    for number, name in enumerate(names):
        of_E = np.ones(len(group_E), bool) if name == "all" else group_E == number
        tokens, patches, learnt = (int(total) for total in sizes_E3[of_E].sum(axis=0))
        result.append(Counts(name, int(of_E.sum()), tokens, learnt, int(pictures_E[of_E].sum()), patches))
    return tuple(result) if len(names) > 2 else tuple(result[-1:])


def lengths(examples: Examples) -> tuple[tuple[int, ...], tuple[tuple[str, int], ...]]:
    """Tokens of an example at each of QUANTILES, and the ids and tokens of the longest."""
    tokens_E = np.asarray(examples.sizes())[:, 0]
    if not len(tokens_E):
        return (), ()
    longest = np.argsort(-tokens_E, kind="stable")[:LONGEST]
    at = np.quantile(tokens_E, QUANTILES, method="nearest")
    return tuple(int(n) for n in at), tuple(
        (check_faults.record_id(examples, int(e)), int(tokens_E[e])) for e in longest
    )


def chosen(count: int, wanted: int, seed: int) -> list[int]:
    """So many of `count` numbers, drawn once for all, in order."""
    drawn = np.random.default_rng([seed, count]).permutation(count)[:wanted]
    return sorted(drawn.tolist())


def shown(examples: Examples, example: int, spelled: Sequence[Spelling | None], seen: Collection[int | None]) -> Shown:
    """One example as it is learnt: the very ids of its arrays, and its pictures."""
    first, stop = (int(s) for s in examples.first_E[example : example + 2])
    verdict = -1 if examples.desirable_E is None else int(examples.desirable_E[example])
    names = (("",) if stop - first == 1 else ("better", "worse")) if verdict < 0 else (VERDICTS[verdict], "elsewhere")
    sequences = []
    for name, s in zip(names, range(first, stop), strict=False):
        span = slice(int(examples.starts_S[s]), int(examples.starts_S[s + 1]))
        learn_L = np.array(examples.learn_T[span])
        learn_L[:1] = False  # nothing stands before the first token
        sequences.append((name, tuple(pieces(np.asarray(examples.tokens_T[span]), learn_L, spelled, seen))))
    record: Record = examples.records[int(examples.record_S[first])]
    grids = [tuple(int(n) for n in g) for g in examples.grids_M3[slice(*examples.grid_starts_S[first : first + 2])]]
    found = []
    for medium, grid in zip(visuals.in_order(record), grids, strict=False):
        data, form = (medium, "") if isinstance(medium, bytes) else (medium[0], f" video of {len(medium)} frames")
        data = drawn.as_file(data)
        with Image.open(io.BytesIO(data)) as opened:
            found.append(Picture(opened.width, opened.height, f"{opened.format}{form}", grid, data))
    return Shown(record.id, examples.groups[int(examples.group_E[example])], tuple(sequences), tuple(found))


def row(rows: Rows, names: Sequence[str], index: int) -> RowReport:
    """One row of the plan, laid as for training."""
    laid = rows.lay(index)
    segments_L, learnt_C = laid["segments_BL"], laid["target_segments_BC"]
    placed, number = [], 0
    for source, example in rows.plan.row(index):
        examples = rows.sources[source]
        grids = examples.grid_starts_S[slice(*examples.first_E[example : example + 2])]
        for s in range(int(examples.first_E[example]), int(examples.first_E[example + 1])):
            number += 1
            at = np.flatnonzero(segments_L == number)
            of_s = slice(*examples.grid_starts_S[s : s + 2])
            patches = int(np.prod(examples.grids_M3[of_s], axis=1).sum()) if len(grids) else 0
            placed.append(
                Placed(
                    number,
                    names[int(source)],
                    check_faults.record_id(examples, int(example)),
                    int(at[0]),
                    len(at),
                    int((learnt_C == number).sum()),
                    patches,
                )
            )
    patches_P = laid.get("patch_segments_BP", np.zeros(0))
    used = int((segments_L > 0).sum()), int((patches_P > 0).sum()), int((learnt_C > 0).sum())
    tokens, patches, targets = rows.packing.budgets.tolist()
    plan = rows.plan
    return RowReport(index, len(rows), used, (tokens, patches, targets), tuple(placed), plan.filled, plan.best)


def thumbnail(picture: Picture, side: int = 220) -> bytes:
    """The picture as a small JPEG on white."""
    from ain_jax.data.images import open_image, to_rgb

    small = to_rgb(open_image(picture.data))
    small.thumbnail((side, side))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=80)
    return file.getvalue()


def seen(picture: Picture, settings: PictureSettings | None) -> str:
    """A picture in words: its size, and what becomes of it."""
    frames, rows, columns = picture.grid
    tiles = f"{frames} {'times' if ' video ' in picture.form else 'tiles of'} " if frames > 1 else ""
    features = int(np.prod(picture.grid)) // (settings.merge_size**2 if settings else 1)
    return (
        f"{picture.width} x {picture.height} pixels, {picture.form}: {tiles}{rows} x {columns} patches, "
        f"{features:,} feature{'s' if features > 1 else ''}"
    )
