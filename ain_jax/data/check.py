"""What a model will see, before it sees it: examples of each source with the learnt tokens marked, counts, faults.

    python -m ain_jax.data.check EXPERIMENT [--stage S] [--source NAME] [--rows N] [--page FILE] [--run_dir DIR]

The stage's own functions make what is shown: the same records, tokenizer, template and pack plan. The exit status is 0
where no fault was found, 1 where some were, 2 where the check could not be made.
"""

import argparse
import dataclasses
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ain_jax.experiment import ExperimentError, find_experiment, nearest, parse_override, read_bindings, resolve

if TYPE_CHECKING:  # both bring jax with them: a mistyped name is told before that
    from ain_jax.data.check_rows import RowReport, SourceReport
    from ain_jax.data.formats import Record
    from ain_jax.stages.common import StageRun

SCANNED = 20_000  # records of a source that are read for faults
READ = 256  # of them at a time
OPENED = 1_000  # of those with pictures, the ones whose pictures are decoded
REASONS = 3  # of rejected rows, the most frequent ones


@dataclasses.dataclass(frozen=True)
class StageReport:
    """All about the data of one stage."""

    stage: str
    row_tokens: int
    sources: Sequence["SourceReport"]
    row: "RowReport | None"
    stops: Sequence[str]  # what the stage itself would stop at
    images: Any = None  # how it cuts pictures
    mixture: str = ""  # what its rows hold of each source and language, as a table


@dataclasses.dataclass(frozen=True)
class Report:
    """All that the check found."""

    experiment: str
    root: Path
    stages: Sequence[StageReport]
    rejected: Sequence[tuple[str, int, Sequence[tuple[str, int]]]]  # file, rows, the most frequent reasons

    @property
    def faults(self) -> int:
        """How many faults there are; rejected rows are none, for nothing is trained on them."""
        of_sources = sum(fault.count for stage in self.stages for s in stage.sources for fault in s.faults)
        return of_sources + sum(len(stage.stops) for stage in self.stages)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """What was asked for on the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m ain_jax.data.check", description=__doc__, formatter_class=form)
    parser.add_argument("experiment", help="a name in experiments/, or the path of a .gin file")
    parser.add_argument("--stage", help="this training stage alone")
    parser.add_argument("--source", help="this source of the mixture alone")
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="examples shown of each source (default 3)")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the check as one HTML page, too")
    parser.add_argument("--run_dir", type=Path, help="the run's folder (default: runs/NAME)")
    parser.add_argument("--scan", type=int, default=SCANNED, metavar="N", help=f"records read (default {SCANNED:,})")
    parser.add_argument("--set", action="append", default=[], metavar="BINDING", dest="overrides")
    asked = parser.parse_args(argv)
    for name in ("rows", "scan"):
        if getattr(asked, name) < 0:
            parser.error(f"--{name} {getattr(asked, name)}: expected 0 or more")
    return asked


def main(argv: Sequence[str] | None = None, experiments: Path = Path("experiments")) -> int:
    """The exit status: 0 no fault, 1 some, 2 the check could not be made, 130 interrupted."""
    asked = arguments(argv)
    try:
        path = find_experiment(asked.experiment, experiments)
        report = check(path, asked, experiments)
        from ain_jax.data import check_page, check_terminal

        check_terminal.print_report(report)
        if asked.page:
            asked.page.parent.mkdir(parents=True, exist_ok=True)
            asked.page.write_text(check_page.render(report), encoding="utf-8")
            print(f"page  {asked.page}")
        return 1 if report.faults else 0
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as fault:
        print(f"\nain_jax: {fault}", file=sys.stderr)
        return 2


def check(path: Path, asked: argparse.Namespace, experiments: Path) -> Report:
    """The report of an experiment's training stages."""
    from ain_jax import run
    from ain_jax.data.mixture import Mixture
    from ain_jax.stages import registry, run_settings

    resolved = resolve(read_bindings(path), registry.SETTINGS, [parse_override(text) for text in asked.overrides])
    name, root = resolved.experiment.name, asked.run_dir or Path("runs") / resolved.experiment.name
    training = [s for s in resolved.experiment.stages if Mixture.__name__ in resolved.stage(s)]
    if not training:
        raise ExperimentError(f"{name} has no stage that trains, so there are no data to check")
    if asked.stage and asked.stage not in training:
        raise ExperimentError(f"--stage {asked.stage!r}: no training stage of {name}: {nearest(asked.stage, training)}")
    stages = [asked.stage] if asked.stage else training
    known = list(dict.fromkeys(s for stage in stages for s in resolved.stage(stage)[Mixture.__name__].weights))
    if asked.source and asked.source not in known:
        raise ExperimentError(f"--source {asked.source!r}: not in the mixture: {nearest(asked.source, known)}")
    run.check_folder(resolved, root)  # the plan is kept there: that of another experiment would be overwritten
    first = next((s for s in resolved.experiment.stages if resolved.experiment.kind(s) == run_settings.EXTEND), None)
    if first and not (root / run_settings.EXTEND / "tokenizer").is_dir():
        print(f"no tokenizer in {root} yet: the stage {first} is run first", file=sys.stderr)
        again = [f"--set={text}" for text in asked.overrides]
        status = run.main(["--exp", str(path), "--run_dir", str(root), "--stage", first, *again], "", experiments)
        if status:
            raise ValueError(f"the stage {first} makes the tokenizer, and it stopped; its message stands above")
    reports = []
    for stage in stages:
        stage_run = registry.StageRun(resolved, root, stage)
        wanted = [s for s in stage_run.get(Mixture).weights if asked.source in (None, s)]
        if wanted:
            reports.append(_stage(stage_run, wanted, asked, whole=asked.source is None))
    return Report(name, root, reports, list(_rejected(root / "data")))


def _stage(run: "StageRun", wanted: Sequence[str], asked: argparse.Namespace, whole: bool) -> StageReport:
    """One stage: its sources one by one, then a row of its plan."""
    from ain_jax.data import check_rows, pack_plan
    from ain_jax.data.mixture import Mixture
    from ain_jax.data.packing import Packing
    from ain_jax.stages import prefer
    from ain_jax.tokenizer.schedule import Vocabulary

    packing, parts = run.get(Packing), run.get(Vocabulary).parts
    stops: list[str] = []
    sources = []
    for name in wanted:
        for part in range(parts) if parts > 1 else [None]:
            called = name if part is None else f"{name}@{part}"
            print(f"{run.stage}: {called} ...", file=sys.stderr)
            sources.append(_source(run, name, called, part, asked, stops))
    row, mixture = None, ""
    if whole and not stops:
        try:
            rows = run.training_rows(prefer.answers(run))
            names = list(wanted) if parts == 1 else [f"{name}@{p}" for p in range(parts) for name in wanted]
            lines = pack_plan.table(rows.plan, dict(zip(names, rows.sources, strict=True)), run.get(Mixture))
            mixture = pack_plan.table_text(lines)
            drawn = Counter({line["source"]: 0 for line in lines})
            for line in lines:
                drawn[line["source"]] += line["drawn"]
            sources = [report if drawn[report.name] else _never_drawn(report, rows, packing) for report in sources]
            row = check_rows.row(rows, names, check_rows.chosen(len(rows), 1, run.seed("check"))[0])
        except ValueError as fault:
            stops.append(str(fault))
    images = run.images if packing.row_patches else None
    return StageReport(run.stage, packing.row_tokens, sources, row, stops, images, mixture)


def _never_drawn(report: "SourceReport", rows: Any, packing: Any) -> "SourceReport":
    """The report of a source of the mixture that no row of the plan holds, with that as a fault."""
    from ain_jax.data import check_faults

    found = check_faults.Found(report.name)
    told = f"no example of it stands in the {len(rows):,} rows of the stage"
    found.add("never drawn", f"{told}: train for more steps, or lower Packing.window = {packing.window}")
    return dataclasses.replace(report, faults=(*report.faults, *found.faults))


def _source(
    run: "StageRun", name: str, called: str, part: int | None, asked: argparse.Namespace, stops: list[str]
) -> "SourceReport":
    """One source; where the stage would stop at it, that is added to `stops` and its records alone are checked."""
    from ain_jax.data import check_faults, check_rows
    from ain_jax.data.packing import Packing
    from ain_jax.stages.common import source_parts

    found, notes = check_faults.Found(called), []
    tokenizer = run.tokenizer if part is None else run.part_tokenizers[part]
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special and t.content != "<image>"]
    pattern = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True)))) if special else None
    examples = records = None
    try:
        examples = run.examples(name, part=part)
        records = examples.records
    except ValueError as fault:
        stops.append(f"source {called}: {fault}")
        try:
            records = run.records(source_parts(name)[0], "train")[0]
        except ValueError:
            return check_rows.SourceReport(called, (), (), (), (), ())
    read = min(len(records), asked.scan)
    if read < len(records):
        notes.append(f"the first {read:,} of {len(records):,} records were read for faults")
    contents = check_faults.of_records(_first(records, read), found, pattern, OPENED)
    for mark in [_test_contents(run, name, asked.scan)] if read else []:
        check_faults.overlap(contents, mark, found)
    if examples is None or not len(examples):
        if examples is not None:
            found.add("no examples", called)
        return check_rows.SourceReport(called, (), (), (), (), tuple(found.faults), tuple(notes))
    check_faults.of_examples(examples, run.get(Packing), tokenizer, found)
    spelled, config = check_rows.spell(tokenizer), run.config
    seen = {index for index in (config.image_token_id, config.video_token_id) if index is not None}
    shown = []
    for example in check_rows.chosen(len(examples), asked.rows, run.seed("check")):
        try:
            shown.append(check_rows.shown(examples, example, spelled, seen))
            examples.segments(example, config.image_token_id, run.images, config.video_token_id)
        except (ValueError, OSError) as fault:
            found.add("example that cannot be laid", f"{check_faults.record_id(examples, example)}: {fault}")
    lengths, longest = check_rows.lengths(examples)
    return check_rows.SourceReport(
        called, check_rows.counts(examples), lengths, longest, tuple(shown), tuple(found.faults), tuple(notes)
    )


def _test_contents(run: "StageRun", name: str, scan: int) -> dict[bytes, str]:
    """The contents of the source's test split; none where it has no such split."""
    from ain_jax.data import check_faults
    from ain_jax.stages.common import source_parts

    kind = source_parts(name)[0]
    try:
        records = run.records(kind, "test")[0]
    except ValueError:
        return {}
    return {check_faults.content_mark(record): record.id for record in _first(records, min(len(records), scan))}


def _first(records: "Sequence[Record]", count: int) -> "Iterator[Record]":
    """The first records, many of them read at a time."""
    for start in range(0, count, READ):
        yield from records[start : min(start + READ, count)]


def _rejected(folder: Path) -> Iterator[tuple[str, int, list[tuple[str, int]]]]:
    """(file, rows, the most frequent reasons) of the rejects files beside the data."""
    for path in sorted(folder.rglob("rejects.jsonl")) if folder.is_dir() else ():
        reasons, rows = Counter(), 0
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                rows += bool(line.strip())
                try:
                    values = json.loads(line)
                except ValueError:
                    continue
                if isinstance(values, dict):
                    told = re.sub(r"record \S+: ", "", str(values.get("reason", "")))
                    reasons[re.sub(r"\d+", "#", told)[:120]] += 1
        if rows:
            yield str(path), rows, reasons.most_common(REASONS)


if __name__ == "__main__":
    sys.exit(main())
