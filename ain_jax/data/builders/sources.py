"""The settings that name a user's files."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from ain_jax.data import filters, forms
from ain_jax.data.builders.sample_records import KINDS
from ain_jax.data.filters import Filters
from ain_jax.data.forms_video import Sampling
from ain_jax.data.languages import CODES, language_code
from ain_jax.experiment import nearest

CODE = re.compile("[a-z]{2,3}(-[a-z0-9]+)*")
NAMED = ("origins", "forms", "languages", "images", "ids", "held_out", "answers_in", "systems", "repeated", "most")


@dataclass(frozen=True)
class Sources:
    """Data of one's own, by name: Sources.files = {"pangea": "/data/pangea/*.json"}. A mixture takes these names."""

    files: Mapping[str, str] = field(default_factory=dict)  # name -> path, pattern, folder, gs:// ...
    origins: Mapping[str, str] = field(default_factory=dict)  # name -> where to get it from
    forms: Mapping[str, str] = field(default_factory=dict)  # name -> one of FORMS; if absent, told from the first rows
    languages: Mapping[str, str] = field(default_factory=dict)  # name -> language of rows that name none
    images: Mapping[str, str] = field(default_factory=dict)  # name -> folder that relative picture paths start at
    # name -> "place": a record is named by its file and line, for published sets that give one id to several rows
    ids: Mapping[str, str] = field(default_factory=dict)
    held_out: Mapping[str, float] = field(default_factory=dict)  # name -> share of records in the split "test", by id
    # What is left out although it is sound (see `data.filters`); it does not count as bad.
    answers_in: Mapping[str, str] = field(default_factory=dict)  # name -> the language whose script answers must have
    # name -> "drop" for no system texts, "own" for none in another script than the answers'; else "keep"
    systems: Mapping[str, str] = field(default_factory=dict)
    repeated: Mapping[str, str] = field(default_factory=dict)  # name -> "drop": what is said again is left out
    # name -> so many training records of each of its parts in a mixture at most, taken evenly over its files
    most: Mapping[str, int] = field(default_factory=dict)
    fps: float = 2.0  # frames a second that are taken of videos' files (.mp4, .webm ...)
    max_frames: int = 768  # of a longer video so many, spread evenly over it
    bad_share: float = 0.01  # more rejected rows than this stop the run
    workers: int = 0  # processes; 0: one a core

    def __post_init__(self):
        found = []
        for name, path in self.files.items():
            if not name or name != Path(name).name or name.startswith(".") or name.endswith(".jsonl") or "@" in name:
                found.append(f"files names {name!r}: expected a plain word, without '/', '@' or '.jsonl'")
            if name in KINDS:
                found.append(f"files names {name!r}, as the sample does: give it another name")
            if not isinstance(path, str) or not path:
                found.append(f"files[{name!r}] = {path!r}: expected a path, a pattern or a folder")
        for setting in NAMED:
            for name in getattr(self, setting):
                if name not in self.files:
                    hint = nearest(name, list(self.files)) if self.files else "files is empty"
                    found.append(f"{setting} names {name!r}, which files does not hold: {hint}")
        for name, form in self.forms.items():
            if form not in forms.FORMS:
                found.append(f"forms[{name!r}] = {form!r}: no such form; {nearest(str(form), list(forms.FORMS))}")
        for name, ids in self.ids.items():
            if ids not in ("own", "place"):
                found.append(f"ids[{name!r}] = {ids!r}: expected 'own', the rows' ids, or 'place', file and line")
        for setting, known in (("systems", filters.SYSTEMS), ("repeated", ("keep", "drop"))):
            for name, value in getattr(self, setting).items():
                if value not in known:
                    expected = ", ".join(map(repr, known))
                    found.append(f"{setting}[{name!r}] = {value!r}: expected one of {expected}")
        for name, language in self.answers_in.items():
            if language_code(language) not in CODES:
                hint = nearest(language, list(CODES))
                found.append(f"answers_in[{name!r}] = {language!r}: no language of that code; {hint}")
        for name, language in self.languages.items():
            if not CODE.fullmatch(language_code(language)):  # any of ISO 639, not those alone that we know by name
                hint = nearest(language, list(CODES))
                found.append(f"languages[{name!r}] = {language!r}: expected a code of two or three letters; {hint}")
        for name, share in self.held_out.items():
            if not 0 <= share < 1:
                found.append(f"held_out[{name!r}] = {share}: expected a share from 0 to below 1")
        for name, most in self.most.items():
            if not isinstance(most, int) or most < 1:
                found.append(f"most[{name!r}] = {most!r}: expected a number of records, 1 or more")
        try:
            Sampling(self.fps, self.max_frames)
        except ValueError as error:
            found.append(str(error))
        if not 0 <= self.bad_share <= 1:
            found.append(f"bad_share = {self.bad_share}: expected a share of the rows, 0 to 1")
        if self.workers < 0:
            found.append(f"workers = {self.workers}: expected a number of processes, or 0 for one a core")
        if found:
            raise ValueError("; ".join(found))

    def of(self, name: str) -> "Source":
        """The settings of one source; a ValueError with the nearest name where there is none."""
        if name not in self.files:
            hint = nearest(name, list(self.files)) if self.files else "Sources.files is empty"
            raise ValueError(f"no source {name!r} in Sources.files: {hint}")
        return Source(
            name,
            self.files[name],
            self.forms.get(name, ""),
            self.languages.get(name, ""),
            self.images.get(name, ""),
            self.ids.get(name, "own"),
            float(self.held_out.get(name, 0.0)),
            Sampling(self.fps, self.max_frames),
            Filters(
                self.answers_in.get(name, ""),
                cast(filters.Systems, self.systems.get(name, "keep")),
                self.repeated.get(name, "keep") == "drop",
            ),
        )


@dataclass(frozen=True)
class Source:
    """What decides the records of one source; the number of workers and of rows that may be bad does not."""

    name: str
    path: str
    form: str
    language: str
    images: str
    ids: str
    held_out: float
    sampling: Sampling
    filters: Filters
