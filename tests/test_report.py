"""The report of a run: what it claims, what it prints, and that its page needs nothing outside itself."""

import base64
import copy
import html.parser
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from ain_jax import report, report_measures, report_page
from ain_jax.stages import evaluate

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
CONFIG = """# small: every value in force; a comment says which line bound it

Experiment.name = 'small'  # small.gin:1
Experiment.description = 'it\\'s <b>small</b>'  # small.gin:2
pretrain/Trainer.steps = 3  # --set 'pretrain/Trainer.steps=3'
"""
SCORES = {
    "untrained": ((2.7, 3.3), (9.0, 8.0), (0.0, 0.0, 0.0), 0.5),
    "pretrain": ((1.5, 1.7), None, None, None),
    "instruct": ((1.6, 1.8), (0.3, 0.2), (0.6, 0.5, 0.55), 0.6),
    "prefer": ((1.61, 1.81), (0.31, 0.21), (0.62, 0.5, 0.56), 0.8),
}


def a_summary() -> dict:
    """A finished run whose every claim holds."""
    models: dict = {}
    for name, (bits, cer, naming, pairs) in SCORES.items():
        models[name] = {"bits_per_byte": {"ar": bits[0], "en": bits[1]}}
        if cer and naming:
            models[name] |= {
                "reading_unseen_words": {"cer": cer[0], "exact": 0.1, "count": 20},
                "reading_new_renderings": {"cer": cer[1], "exact": 0.1, "count": 20},
                "naming_new_renderings": {"ar": naming[0], "en": naming[1], "accuracy": naming[2], "count": 40},
                "preference": {
                    kind: {"accuracy": pairs, "margin": 1.0, "pairs": 60}
                    for kind in ("wrong_language", "corrupted_reading")
                },
            }
    models["baselines"] = {
        "bits_per_byte": {"ar": 1.69, "en": 1.82},
        "constant": {
            "reading_unseen_words": {"cer": 0.8, "answer": "الان"},
            "reading_new_renderings": {"cer": 0.8, "answer": "متلا"},
            "naming_new_renderings": {"accuracy": 0.01, "ar": 0.02, "en": 0.02, "answer": "تونس"},
        },
        "ngram": 5,
    }

    def moved(*per_word):
        rest = {"tokens_per_byte": 0.2, "continued_share": 0.5, "byte_share": 0.0}
        return {key: {"tokens_per_word": n} | rest for key, n in zip(("before", "after"), per_word, strict=True)}

    losses = {"loss": 3.0, "loss/documents/ar": 3.1, "accuracy": 0.2}
    return {
        "experiment": "small",
        "seed": 7,
        "stages": {
            "extend_tokenizer": {
                "new_pieces": 10,
                "fertility": {"ar": moved(5.0, 2.0), "en": moved(1.3, 1.3)},
            },
            "pretrain": {"steps": 3, "first": losses, "last": losses, "slots_filled": 0.99},
            "instruct": {"steps": 3, "first": losses, "last": losses, "slots_filled": 0.99},
            "prefer": {"steps": 3, "first": losses, "last": losses, "slots_filled": 0.99},
            "evaluate": {"models": models},
            "export": {"folder": "export", "files": {"config.json": 1500, "model.safetensors": 2_000_000}},
        },
        "machine": {"platform": "a machine", "python": "3.12", "devices": ["cpu"], "processes": 1},
        "versions": {"jax": "1.2.3"},
        "times": {"seconds": {"pretrain": 61.0, "evaluate": 200.0}, "tokens_per_second": {"pretrain": 1234}},
    }


def without(tree: dict, path: str) -> dict:
    """The tree with one entry removed, given as "a/b/c"."""
    tree = copy.deepcopy(tree)
    *above, last = path.split("/")
    here = tree
    for key in above:
        here = here[key]
    del here[last]
    return tree


def changed(path: str, value: float) -> dict:
    """`a_summary` with one number of the evaluation, or of the fertility, replaced."""
    tree = a_summary()
    here = tree["stages"]["extend_tokenizer" if path.startswith("fertility") else "evaluate"]
    *above, last = path.split("/")
    for key in above:
        here = here[key]
    assert last in here
    here[last] = value
    return tree


def failed(summary: dict) -> list[str]:
    return [verdict.claim for verdict in report.verdicts(summary) if not verdict.holds]


def write_shown(root: Path, model: str, name: str, rows: list[tuple[str, str, str]], picture: bool = True) -> None:
    folder = root / "evaluate" / "shown"
    folder.mkdir(parents=True, exist_ok=True)
    shown = []
    for n, (question, expected, answer) in enumerate(rows):
        row = {"id": f"x/{n}", "question": question, "expected": expected, "answer": answer}
        if picture:
            (folder / f"{name}-{n}-0.png").write_bytes(PNG)
            row["pictures"] = [f"{name}-{n}-0.png"]
        shown.append(row)
    (folder / f"{model}-{name}.json").write_text(json.dumps(shown), encoding="utf-8")


@pytest.fixture
def run(tmp_path):
    """The folder of a finished run."""
    (tmp_path / "summary.json").write_text(json.dumps(a_summary()), encoding="utf-8")
    (tmp_path / "config.gin").write_text(CONFIG, encoding="utf-8")
    for stage, group in (("pretrain", "documents"), ("prefer", "preference/wrong_language")):
        (tmp_path / stage).mkdir()
        names = [f"loss/{group}/ar", f"loss/{group}/en"] if stage == "pretrain" else [f"loss/{group}"]
        lines = [{"step": s, "loss": 3.0 / s, **dict.fromkeys(names, 2.5 / s)} for s in (1, 2, 3)]
        lines = [line | ({"margin": 0.1} if stage == "prefer" else {}) for line in lines]
        (tmp_path / stage / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")
    question = "اقرأ النص في الصورة."
    write_shown(tmp_path, "untrained", "reading_unseen_words", [(question, "ك ت ا ب", "<script>alert('1')</script>")])
    write_shown(tmp_path, "instruct", "reading_unseen_words", [(question, "ك ت ا ب", "ك ت ا ب")])
    write_shown(tmp_path, "prefer", "reading_unseen_words", [(question, "ك ت ا ب", "ك ت ا ن")])
    return tmp_path


class Elements(html.parser.HTMLParser):
    """Every start tag with its attributes, and the text of each `bdi` with the attributes it stands under."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, dict[str, str | None]] = {}
        self._inside: dict[str, str | None] | None = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = dict(attrs) if tag == "bdi" else self._inside

    def handle_endtag(self, tag):
        self._inside = None if tag == "bdi" else self._inside

    def handle_data(self, data):
        if self._inside is not None:
            self.texts[data] = self._inside


def page(root: Path, summary: dict | None = None) -> str:
    return report.write(summary or a_summary(), root).read_text("utf-8")


def test_every_claim_of_a_good_run_holds_and_each_measure_is_claimed():
    verdicts = report.verdicts(a_summary())
    assert all(v.holds for v in verdicts)
    # 1 fall of tokens; 2 languages x (untrained, n-gram); 2 reading sets x (untrained, constant);
    # naming: (all, 2 languages) x (untrained, constant); 2 kinds of pair
    assert len(verdicts) == 1 + 4 + 4 + 6 + 2
    claim, value, bound, holds = verdicts[0]
    assert claim == "Arabic tokens per word fall by at least 40%"
    assert (value, bound, holds) == (pytest.approx(0.6), 0.4, True)


@pytest.mark.parametrize(
    ("path", "value", "claims"),
    [
        ("fertility/ar/after/tokens_per_word", 3.01, ["Arabic tokens per word"]),
        ("fertility/en/after/tokens_per_word", 9.0, []),  # nothing is claimed of it
        ("models/pretrain/bits_per_byte/ar", 1.69, ["Arabic: pretrain below a byte 5-gram"]),  # equal is not below
        ("models/pretrain/bits_per_byte/en", 3.4, ["pretrain below untrained", "pretrain below a byte"]),
        ("models/prefer/bits_per_byte/en", 3.4, []),  # judged after pretraining
        ("models/prefer/reading_unseen_words/cer", 0.9, ["unseen words: prefer below the best constant"]),
        ("models/untrained/reading_new_renderings/cer", 0.1, ["new renderings: prefer below untrained"]),
        ("models/prefer/naming_new_renderings/accuracy", 0.005, ["new renderings: prefer above the best"]),
        ("models/prefer/naming_new_renderings/en", 0.02, ["English: prefer above the best constant"]),
        ("models/untrained/naming_new_renderings/ar", 0.7, ["Arabic: prefer above untrained"]),
        ("models/prefer/preference/wrong_language/accuracy", 0.6, ["wrong language: prefer above instruct"]),  # no rise
        ("models/untrained/preference/wrong_language/accuracy", 1.0, []),  # judged against instruct
        ("models/prefer/reading_unseen_words/cer", math.nan, ["below untrained", "below the best constant"]),
    ],
)
def test_a_claim_fails_where_its_number_does(path, value, claims):
    told = failed(changed(path, value))
    assert len(told) == len(claims)
    assert all(claim in one for claim, one in zip(claims, told, strict=True)), told


def test_a_fall_by_exactly_the_target_holds():
    assert failed(changed("fertility/ar/after/tokens_per_word", 3.0)) == []


@pytest.mark.parametrize(
    "path",
    [
        "stages/extend_tokenizer",
        "stages/evaluate",
        "stages/export",
        "stages/prefer",
        "stages/instruct",
        "stages/evaluate/models/prefer",
        "stages/evaluate/models/untrained",
        "stages/evaluate/models/pretrain",
        "stages/evaluate/models/baselines",
        "stages/evaluate/models/baselines/constant",
        "stages/evaluate/models/prefer/preference",
        "stages/evaluate/models/instruct/reading_unseen_words",
        "stages/evaluate/models/baselines/bits_per_byte/ar",
        "times",
        "machine",
        "versions",
    ],
)
def test_what_an_experiment_leaves_out_is_left_out(path, run, capsys):
    summary = without(a_summary(), path)
    assert failed(summary) == []  # nothing is claimed of what is not there
    for stage, numbers in summary["stages"].items():
        report.print_stage(stage, numbers, 1.0)
    report.print_table(summary)
    assert "small" in capsys.readouterr().out
    assert page(run, summary).rstrip().endswith("</html>")


def test_a_run_of_nothing_has_a_page(tmp_path, capsys):
    report.print_table({"experiment": "empty", "stages": {}})
    assert report.write({"experiment": "empty", "stages": {}}, tmp_path).is_file()
    assert capsys.readouterr().out == ""


def test_the_table_has_a_row_for_each_measure_and_a_column_for_each_stage(capsys):
    report.print_table(a_summary())
    lines = capsys.readouterr().out.splitlines()
    assert "\x1b" not in "".join(lines)
    row = next(line for line in lines if "bits per byte, Arabic" in line).split()
    assert row[-7:] == ["2.700", "1.500", "1.600", "1.610", "1.690", "lower", "ok"]
    assert next(line for line in lines if "tokens per word, English" in line).split()[-3:] == ["1.30", "1.30", "lower"]
    assert "17 of 17 targets hold" in lines


def test_the_table_names_the_claim_that_fails(capsys):
    report.print_table(changed("models/prefer/preference/wrong_language/accuracy", 0.6))
    out = capsys.readouterr().out
    assert "16 of 17 targets hold" in out
    assert "not met: preference accuracy, wrong language: prefer above instruct (0.600 against 0.600)" in out


def test_columns_follow_the_stages():
    summary = a_summary()
    rows = report_measures.table(summary)
    order = ["untrained", "extend_tokenizer", "pretrain", "instruct", "prefer", "baseline"]
    assert report_measures.columns(summary, rows) == order


@pytest.mark.parametrize(
    ("stage", "told"),
    [
        ("extend_tokenizer", "10 new pieces; tokens per word ar 5.00 -> 2.00, en 1.30 -> 1.30"),
        ("pretrain", "3 steps, 99.0% of slots filled; loss 3.000 -> 3.000"),
        ("evaluate", "untrained, pretrain, instruct, prefer measured; 16 of 16 targets hold"),
        ("export", "2 files, 2.0 MB, in export/"),
    ],
)
def test_a_stage_is_told_in_a_line_or_two(stage, told, capsys):
    report.print_stage(stage, a_summary()["stages"][stage], 245.2)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 2
    assert lines[0] == f"{stage:16} 4 min 05 s; {told}"


def test_durations():
    told = {0.04: "0.0 s", 119.9: "119.9 s", 119.99: "2 min 00 s", 3599.6: "60 min 00 s"}
    assert {seconds: report_measures.duration(seconds) for seconds in told} == told


def test_the_page_needs_nothing_outside_itself(run):
    text = page(run)
    elements = Elements(text)
    assert "http:" not in text and "https:" not in text
    for tag, attributes in elements.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                assert (value or "").startswith(("data:image/png;base64,", "#")), (tag, name, value)
    assert "@import" not in text
    assert all(target.startswith("#") for target in _css_addresses(text))
    assert len([t for t, _ in elements.tags if t == "img"]) == 1  # the picture, once for its three answers
    assert sum(t == "path" for t, _ in elements.tags) > 4  # the curves


def _css_addresses(text: str) -> list[str]:
    return [part.split(")")[0].strip("'\" ") for part in text.split("url(")[1:]]


def test_the_page_shows_the_config_in_force(run):
    assert "pretrain/Trainer.steps = 3" in page(run)

    class Resolved:
        def text(self):
            return "pretrain/Trainer.steps = 4"

    text = report.write(a_summary(), run, Resolved()).read_text("utf-8")
    assert "pretrain/Trainer.steps = 4" in text and "pretrain/Trainer.steps = 3" not in text


def test_ids_in_the_page_are_unique(run):
    ids = [attributes["id"] for _, attributes in Elements(page(run)).tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = {v for _, attributes in Elements(page(run)).tags for k, v in attributes.items() if k == "aria-labelledby"}
    assert used <= set(ids)


def test_what_a_model_or_a_user_writes_is_escaped(run):
    text = page(run, a_summary() | {"experiment": "<i>small</i>"})
    assert "<script" not in text and "<b>" not in text and "<i>" not in text
    assert "&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt;" in text
    assert "it&#39;s &lt;b&gt;small&lt;/b&gt;" in text  # the description, out of the config
    assert "<title>&lt;i&gt;small&lt;/i&gt;: report</title>" in text


def test_arabic_stands_right_to_left_and_apart_from_what_surrounds_it(run):
    texts = Elements(page(run)).texts
    assert texts["ك ت ا ب"] == {"lang": "ar", "dir": "rtl"}
    assert texts["ك ت ا ن"] == {"lang": "ar", "dir": "rtl"}
    assert texts["اقرأ النص في الصورة."] == {"lang": "ar", "dir": "rtl"}
    assert texts["<script>alert('1')</script>"] == {"lang": "en", "dir": "ltr"}


@pytest.mark.parametrize(
    ("text", "direction", "language"),
    [
        ("إ ذ ا / ل ك ن", "rtl", "ar"),
        ("12 شمس", "rtl", "ar"),  # digits have no direction of their own
        ("12 suns", "ltr", "en"),
        ("كِتَابٌ", "rtl", "ar"),  # vowel marks are no letters
        ("the word شمس", "ltr", ""),
        ("شمس the word", "rtl", ""),
        ("Tunisia", "ltr", "en"),
        ("Côte", "ltr", ""),
        ("...", "auto", ""),
        ("", "auto", ""),
    ],
)
def test_direction_and_language_of_a_text(text, direction, language):
    assert (report_page.direction(text), report_page.lang(text)) == (direction, language)


def test_controls_cannot_turn_or_break_the_page(run):
    hostile = "\u202eabc\x00\ud800\rd"
    write_shown(run, "prefer", "reading_unseen_words", [("?", "ك", hostile)])
    text = page(run)
    assert "\ufffdabc\ufffd\ufffd\ufffdd" in text
    assert not {"\u202e", "\x00", "\ud800"} & set(text)


def test_answers_stand_side_by_side_with_their_scores(run):
    (shown,) = report_page.samples(run / "evaluate" / "shown", ["untrained", "pretrain", "instruct", "prefer"])
    assert shown["models"] == ["untrained", "instruct", "prefer"]
    (row,) = shown["rows"]
    assert row["expected"] == "ك ت ا ب"
    assert [answer[2] for answer in row["answers"]][1:] == ["right", "CER 0.25"]  # one letter of four
    assert row["pictures"] == ["data:image/png;base64," + base64.b64encode(PNG).decode()]


def test_names_are_compared_as_they_are_scored_and_pictures_may_be_missing(tmp_path):
    rows = [("?", "Sun", "sun."), ("?", "Sun", "moon")]
    write_shown(tmp_path, "prefer", "naming_new_renderings", rows, picture=False)
    (shown,) = report_page.samples(tmp_path / "evaluate" / "shown", ["prefer"])
    assert [row["answers"] for row in shown["rows"]] == [[("prefer", "sun.", "right")], [("prefer", "moon", "wrong")]]
    assert [row["pictures"] for row in shown["rows"]] == [[], []]


def test_a_picture_is_read_from_its_own_folder_alone(run):
    path = run / "evaluate" / "shown" / "prefer-reading_unseen_words.json"
    path.write_text(path.read_text("utf-8").replace("reading_unseen_words-0-0.png", "../../summary.json"), "utf-8")
    (shown,) = report_page.samples(path.parent, ["untrained", "instruct", "prefer"])
    assert shown["rows"][0]["pictures"] == []


def test_the_evaluation_keeps_each_picture_once_as_it_is(tmp_path):
    assert evaluate._picture(tmp_path / "shown", "naming-0-0", PNG) == "naming-0-0.png"
    assert evaluate._picture(tmp_path / "shown", "naming-0-0", PNG + b"later") == "naming-0-0.png"
    assert evaluate._picture(tmp_path / "shown", "naming-1-0", b"\xff\xd8\xff") == "naming-1-0.jpg"
    kept = {path.name: path.read_bytes() for path in (tmp_path / "shown").iterdir()}
    assert kept == {"naming-0-0.png": PNG, "naming-1-0.jpg": b"\xff\xd8\xff"}


def test_curves_are_named_smoothed_and_say_their_unit():
    lines = [{"step": s, "loss": float(s), "accuracy": 0.0} for s in range(1, 101)]
    lines[1]["loss/read/ar"] = 5.0  # a group that occurred once
    plot = report_page.plot("instruct", lines)
    assert plot is not None
    assert (plot.unit, plot.steps, plot.window) == ("nats per token", 100, 4)
    assert [s.name for s in plot.series] == ["all", "read/ar"]
    assert (plot.series[0].first, plot.series[0].last) == (2.0, 99.0)  # means of 1 2 3 and of 98 99 100
    assert (plot.series[1].first, plot.series[1].last) == (5.0, 5.0)
    line = {"step": 1, "loss": 0.69, "margin": 0.0, "loss/preference/wrong_language": 0.7}
    pairs = report_page.plot("prefer", [line])
    assert pairs is not None
    assert pairs.unit == "nats per pair"
    assert [s.name for s in pairs.series] == ["all", "wrong_language"]
    judged = report_page.plot("prefer", [line | {"baseline": 0.0}])
    assert judged is not None and judged.unit == "loss per judged answer"
    assert report_page.plot("export", []) is None


def test_watched_texts_have_curves_from_before_the_first_step(tmp_path):
    lines = [
        {"step": 0, "documents/ar": 3.0, "documents/en": 1.0},
        {"step": 9, "documents/ar": 2.0, "documents/en": 1.5},
    ]
    (tmp_path / "watch.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (plot,) = report_page.plots("instruct", tmp_path)
    assert (plot.stage, plot.unit, plot.steps) == ("instruct: held-out texts", "bits per byte", 9)
    assert [(s.name, s.first, s.last) for s in plot.series] == [("documents/ar", 3.0, 2.0), ("documents/en", 1.0, 1.5)]
    looks = report_page._looks(["loss/documents/ar", "loss/documents/en"])
    assert [s.colour for s in plot.series] == [look[0] for look in looks.values()]  # a language keeps its own


def test_what_learns_is_on_the_page(run):
    part = {"module": "visual/merger", "parameters": 12464, "learns": 0, "rate": "frozen", "by": "rank <4>"}
    told = {"parameters": 66368, "learns": 1600, "modules": [part]}
    (run / "pretrain").mkdir(exist_ok=True)
    (run / "pretrain" / "learns.json").write_text(json.dumps(told), encoding="utf-8")
    page = report_page.render(a_summary(), run, CONFIG)
    assert "pretrain: 1,600 numbers learn, in a model of 66,368" in page
    for words in ("visual/merger", "12,464", "frozen", "rank &lt;4&gt;"):
        assert f">{words}<" in page


def test_a_language_keeps_its_colour_and_a_source_its_dash():
    one = report_page._looks(["loss/documents/ar", "loss/documents/en"])
    two = report_page._looks(["loss/name/en", "loss/read/ar", "loss/read/en"])
    assert one["loss/documents/ar"][0] == two["loss/read/ar"][0] != two["loss/read/en"][0] == two["loss/name/en"][0]
    assert two["loss/read/ar"][1] == two["loss/read/en"][1] != two["loss/name/en"][1]


def test_a_finished_run_is_reported_anew_from_its_folder(run):
    first = page(run)
    (run / "report.html").unlink()
    command = [sys.executable, "-m", "ain_jax.report", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "17 of 17 targets hold" in done.stdout and str(run / "report.html") in done.stdout
    assert (run / "report.html").read_text("utf-8") == first  # nothing in it changes from one writing to the next
    assert not list(run.glob("*.tmp"))


def test_a_check_fails_where_a_target_does_not_hold(run, capsys):
    assert report.main([str(run), "--check"]) == 0
    (run / "summary.json").write_text(json.dumps(changed("models/prefer/reading_unseen_words/cer", 0.9)))
    assert report.main([str(run)]) == 0
    capsys.readouterr()
    assert report.main([str(run), "--check"]) == 1
    assert capsys.readouterr().err == "ain_jax: 16 of 17 targets hold, where --check expects one or more, and all\n"
    (run / "summary.json").write_text(json.dumps({"experiment": "small", "stages": {}}))
    assert report.main([str(run), "--check"]) == 1  # nothing was claimed


@pytest.mark.parametrize("content", [None, '{"experiment": '])
def test_an_unfinished_run_is_refused(content, run, capsys):
    (run / "summary.json").unlink()
    if content:
        (run / "summary.json").write_text(content)
    assert report.main([str(run)]) == 1
    assert str(run / "summary.json") in capsys.readouterr().err
    assert not (run / "report.html").exists()


def test_a_page_that_fails_leaves_the_old_one(run, monkeypatch):
    before = page(run)

    # Encoded only while it is written: a page written in place would be empty by then.
    monkeypatch.setattr(report_page, "render", lambda *_: "half a page\ud800")
    with pytest.raises(UnicodeEncodeError):
        report.write(a_summary(), run)
    assert (run / "report.html").read_text("utf-8") == before
