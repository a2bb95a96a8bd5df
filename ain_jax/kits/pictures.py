"""Fonts and pictures of registry packages, made into small files of a kit, and rows that tell whose they are.

What is shown is told as drawings (`data.drawn`), so a map or an emoji is one file however many questions there are.
"""

import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from ain_jax.data.drawn import AROUND, BORDER, FIRST, SEA
from ain_jax.kits.packages import Get, Unavailable, clean
from ain_jax.kits.texts import ARABIC, catalog
from ain_jax.sample.rebuild import RESVG, cldr_names

STYLES = {  # package and files of each emoji style, and how its files are called
    "noto": ("emoji-datasource-google", r"package/img/google/64/[0-9a-f-]+\.png"),
    "openmoji": ("openmoji", r"package/color/svg/[0-9A-F-]+\.svg"),
    "fluent": ("@lobehub/fluent-emoji-3d", r"package/assets/[0-9a-f-]+\.webp"),
    "twemoji": ("@twemoji/svg", r"package/[0-9a-f-]+\.svg"),
}
EMOJI_SIDE, STAMP_SIDE, FLAG_SIDE, MAP_SIDE = 72, 128, 84, 392  # pixels of the longer side of the stored file
FONTS = (
    ("fonts-noto-core", r".*/Noto(NaskhArabic|SansArabic|KufiArabic|NastaliqUrdu)-\w+\.ttf"),
    ("fonts-hosny-amiri", r".*/Amiri-\w+\.ttf"),
    ("fonts-sil-scheherazade", r".*\.ttf"),
    ("fonts-sil-lateef", r".*\.ttf"),
    ("fonts-sil-harmattan", r".*\.ttf"),
    ("fonts-kacst", r".*/Kacst(Book|Letter|Naskh|Office|Screen|Pen|Farsi|Poster|Title|Decorative)\.ttf"),
    ("fonts-farsiweb", r".*\.ttf"),
    ("fonts-arabeyes", r".*/ae_(?!Haramain)\w+(-\w+)?\.ttf"),
)
HELD_OUT_FONTS = re.compile("Amiri|NotoKufi")  # one in the book hand, one square: whole families
HELD_OUT_STYLE = "twemoji"
WATER = re.compile(r"\b(water|sea|ocean|lakes?|gulf)\b", re.IGNORECASE)


def fonts(get: Get, out: Path, package: str) -> list[str]:
    """The names of the package's font files, written into out/fonts."""
    names = []
    for name, data in get(package, dict(FONTS)[package]).items():
        _write(out / "fonts" / PurePosixPath(name).name, data)
        names.append(PurePosixPath(name).name)
    return sorted(names)


@dataclass(frozen=True)
class Named:
    """A picture and what it shows."""

    id: str
    picture: str  # below the kit's folder
    ar: str
    en: str
    style: str = ""


def svg(data: bytes, width: int) -> bytes:
    """The drawing as a PNG file."""
    try:
        import resvg_py  # pyright: ignore[reportMissingImports]  (a tool that only kits need)
    except ImportError:
        raise Unavailable(f"drawings in SVG need resvg-py: pip install resvg-py=={RESVG}") from None
    return bytes(resvg_py.svg_to_bytes(svg_string=data.decode(), width=width, skip_system_fonts=True))


def emoji_names(get: Get) -> dict[str, tuple[str, str]]:
    """Code points ("1f600", "1f468-200d-1f33e") -> (Arabic, English) names; neither skin tones nor flags."""
    tables = []
    for package, folder in (
        ("cldr-annotations-full", "annotations"),
        ("cldr-annotations-derived-full", "annotationsDerived"),
    ):
        for language in ("ar", "en"):
            (data,) = get(package, rf"package/{folder}/{language}/annotations\.json").values()
            tables.append(json.loads(data)[folder]["annotations"])
    names = {}
    for ar, en in (tables[:2], tables[2:]):
        for mark in sorted(ar.keys() & en.keys()):
            codes = [f"{ord(c):x}" for c in mark if c != "\ufe0f"]
            toned = any(0x1F3FB <= ord(c) <= 0x1F3FF for c in mark)
            flag = any(0x1F1E6 <= ord(c) <= 0x1F1FF for c in mark)
            if not toned and not flag and "tts" in ar[mark] and "tts" in en[mark]:
                names["-".join(codes)] = clean(ar[mark]["tts"][0]), clean(en[mark]["tts"][0])
    return {key: pair for key, pair in sorted(names.items()) if ARABIC.search(pair[0]) and not ARABIC.search(pair[1])}


def emoji(get: Get, out: Path, style: str) -> list[Named]:
    """The emoji of one style that have a name in both languages, each concept once."""
    names, package, pattern = emoji_names(get), *STYLES[style]
    rows = []
    for name, data in sorted(get(package, pattern).items()):
        codes = PurePosixPath(name).stem.lower().split("-")
        key = "-".join(code.lstrip("0") for code in codes if code != "fe0f")
        if key in names:
            place = f"emoji/{style}/{key}.png"
            _write(out / place, _small(svg(data, EMOJI_SIDE) if name.endswith(".svg") else data, EMOJI_SIDE))
            rows.append(Named(f"{style}/{key}", place, *names.pop(key), style))
    return rows


def stamps(get: Get, out: Path) -> list[Named]:
    """Pictures, many of them cut-out photographs, with a sentence in each language."""
    files = get("tuxpaint-stamps-default", r".*/stamps/.*\.(png|svg|txt)")
    rows: dict[str, Named] = {}
    for name, data in sorted(files.items()):
        path, key = PurePosixPath(name), name.partition("/stamps/")[2].rpartition(".")[0]
        text = files.get(str(path.with_suffix(".txt")))
        # Some come as PNG and as SVG: two of one stamp, and the one that is held out would be trained on as the other.
        if path.suffix == ".txt" or text is None or path.stem.endswith("_mirror") or key in rows:
            continue
        lines = text.decode("utf-8", "ignore").splitlines()
        arabic = next((clean(line[8:]).strip(". ") for line in lines if line.startswith("ar.utf8=")), "")
        english = clean(lines[0]) if lines else ""
        if not ARABIC.search(arabic) or re.search("[A-Za-z]", arabic) or not english or len(english.split()) > 15:
            continue
        place = f"stamps/{key.replace('/', '-')}.png"
        try:
            _write(out / place, _small(svg(data, STAMP_SIDE) if path.suffix == ".svg" else data, STAMP_SIDE))
        except ValueError:  # a drawing that says no size
            continue
        rows[key] = Named(f"stamps/{key}", place, arabic, english.strip("."))
    return list(rows.values())


def flags(get: Get, out: Path, form: str) -> list[Named]:
    """Flags in the form "4x3" or "1x1", with their countries' names."""
    names = cldr_names(get, "territories")
    rows = []
    for name, data in sorted(get("flag-icons", rf"package/flags/{form}/[a-z]{{2}}\.svg").items()):
        code = PurePosixPath(name).stem
        if code.upper() in names:
            place = f"flags/{form}/{code}.png"
            _write(out / place, _small(svg(data, FLAG_SIDE), FLAG_SIDE))
            rows.append(Named(f"flags/{form}/{code}", place, *names[code.upper()], form))
    return rows


@dataclass(frozen=True)
class Division:
    value: int  # of its pixels
    ar: str
    en: str
    capital: tuple[str, str] | None
    place: tuple[float, float]  # of its middle, from the left and from the top, as shares of all regions' extent
    share: float  # of the map's pixels


@dataclass(frozen=True)
class Map:
    id: str
    picture: str
    ar: str
    en: str
    width: int
    height: int
    divisions: tuple[Division, ...]


def maps(get: Get, out: Path) -> Iterator[Map]:
    """KGeography's maps whose name and regions are named in Arabic, written as one value a region."""
    files = get("kgeography-data", r".*/usr/share/kgeography/[^/]+\.(kgm|png)|usr/share/kgeography/[^/]+\.(kgm|png)")
    (data,) = get("kgeography-data", r".*/ar/LC_MESSAGES/kgeography\.mo").values()
    arabic = catalog(data)
    pictures = {PurePosixPath(name).name: data for name, data in files.items()}
    for name, told in sorted(pictures.items()):
        if name.endswith(".kgm"):
            made = _map(name, told.decode("utf-8"), pictures, arabic, out)
            if made is not None:
                yield made


def _field(text: str, name: str) -> str:
    found = re.search(rf"<{name}>(.*?)</{name}>", text, re.DOTALL)
    return clean(found[1].replace("&amp;", "&")) if found else ""


def _map(name: str, told: str, pictures: dict[str, bytes], arabic: dict[str, str], out: Path) -> Map | None:
    head = told.partition("<division>")[0]
    file, title = _field(head, "mapFile"), _field(head, "name")
    in_arabic = lambda text: clean(arabic.get(f"{name}\x04{text}", ""))
    if file not in pictures or not ARABIC.search(in_arabic(title)):
        return None
    colours_HW3 = np.asarray(Image.open(io.BytesIO(pictures[file])).convert("RGB")).astype(np.int64)
    codes_HW = colours_HW3 @ np.array([65536, 256, 1])
    values_HW = np.full(codes_HW.shape, BORDER, np.uint8)
    found = []
    for text in re.findall(r"<division>(.*?)</division>", told, re.DOTALL):
        region = _field(text, "name")
        code = sum(int(_field(text, c) or 0) * f for c, f in (("red", 65536), ("green", 256), ("blue", 1)))
        if _field(text, "ignore") == "yes":
            plain = SEA if WATER.search(region) else BORDER if region == "Frontier" else AROUND
            values_HW[codes_HW == code] = plain
        elif FIRST + len(found) < 256:
            values_HW[codes_HW == code] = FIRST + len(found)
            found.append((region, _field(text, "capital")))
        else:
            return None
    picture = Image.fromarray(values_HW)
    ratio = min(1.0, MAP_SIDE / max(picture.size))
    picture = picture.resize((round(picture.width * ratio), round(picture.height * ratio)), Image.Resampling.NEAREST)
    values_HW = np.asarray(picture)
    rows, columns = np.nonzero(values_HW >= FIRST)
    if not len(rows):
        return None
    divisions = []
    for value, (region, capital) in enumerate(found, start=FIRST):
        at = np.nonzero(values_HW == value)
        if not len(at[0]) or not ARABIC.search(in_arabic(region)):
            continue
        across = (float(at[1].mean()) - columns.min()) / max(1, columns.max() - columns.min())
        down = (float(at[0].mean()) - rows.min()) / max(1, rows.max() - rows.min())
        both = (in_arabic(capital), capital) if ARABIC.search(in_arabic(capital)) else None
        share = len(at[0]) / values_HW.size
        divisions.append(Division(value, in_arabic(region), region, both, (across, down), share))
    place = f"maps/{name.removesuffix('.kgm')}.png"
    (out / place).parent.mkdir(parents=True, exist_ok=True)
    picture.save(out / place, optimize=True)
    return Map(name.removesuffix(".kgm"), place, in_arabic(title), title, *picture.size, tuple(divisions))


def _small(data: bytes, side: int) -> bytes:
    """The picture as a PNG of at most 128 colours, its longer side at most `side` pixels."""
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    ratio = min(1.0, side / max(picture.size))
    if ratio < 1:
        size = (max(1, round(picture.width * ratio)), max(1, round(picture.height * ratio)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.quantize(128, Image.Quantize.FASTOCTREE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def generator(seed: int, stream: str, index: int = 0) -> np.random.Generator:
    """Random numbers of one row: they depend on these three, not on what was drawn before."""
    return np.random.default_rng([seed, zlib.crc32(stream.encode()), index])
