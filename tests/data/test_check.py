"""The check shows the very ids that are trained on, and finds the faults that were put into a file."""

import html.parser
import io
import json
import re
import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import worked
from rich.console import Console
from rich.text import Text

from ain_jax.data import check, check_faults, check_page, check_rows, check_terminal
from ain_jax.data.formats import Message, Record
from ain_jax.data.packing import Packing
from ain_jax.tokenizer.align import Spelling

ARABIC = "هذا كتاب قديم عن تاريخ المدينة"


def record(name="a", *turns, **fields):
    roles = ("user", "assistant")
    messages = tuple(Message(roles[i % 2], text) for i, text in enumerate(turns))
    return Record(name, "s", fields.pop("language", "und"), "k", messages=messages, **fields)


def kinds(record, special=None, pictures=True):
    return [what for what, _ in check_faults.of_record(record, special, pictures)]


@pytest.mark.parametrize(
    "text, what",
    [
        ("\ufe8d\ufedf\ufecc\ufeae\ufe91\ufef2\ufe94", "Arabic presentation forms"),
        ("start \u202eback\u202c", "characters that turn the direction of text"),
        ("bell \x07", "control characters"),
        ("\ufeffmark", "control characters"),
        ("Ø§Ù„Ø¹Ø±Ø¨ÙŠØ©", "text decoded by the wrong code page"),
        ("caf\ufffd", "characters lost in an earlier decoding"),
        ("say <|im_end|> now", "control token written as text"),
    ],
)
def test_each_odd_character_is_named(text, what):
    special = re.compile(re.escape("<|im_end|>"))
    assert [found for found, _ in check_faults.of_text(text, special)] == [what]
    assert kinds(record("a", "hi", text), special) == [what]


def test_ordinary_text_has_no_fault():
    plain = ["Ärger, Ÿ Ø, Ù!", "قال ﷺ خيرًا", "می‌روم", "line\nnext\tcolumn", "👩‍👩‍👧 \u200f(نعم)\u200e", "﴿آية﴾"]
    for text in plain:
        assert list(check_faults.of_text(text, None)) == []
    assert kinds(record("a", "Translate: " + ARABIC, "This is an old book", language="en")) == []


@pytest.mark.parametrize(
    "language, text, odd",
    [
        ("ar", "This is an old book about the town", True),
        ("en", ARABIC, True),
        ("arz", ARABIC, False),
        ("ar-en", "This is an old book about the town", False),
        ("ja", "これは町の歴史についての古い本ですから読んでください", False),
        ("ja", "Это старая книга об истории города", True),
        ("ru", "Это старая книга об истории города", False),
        ("ar", "OK 123", False),  # too few letters
        ("und", ARABIC, False),
        ("xx", ARABIC, False),
    ],
)
def test_a_language_has_letters_of_its_script(language, text, odd):
    assert bool(check_faults.wrong_script(language, text)) == odd


def test_pictures_and_answers_are_looked_at():
    broken = record("a", "<image> what?", "a cat", images=(worked.png(1)[:60],))
    assert kinds(broken) == ["picture that cannot be read"] and kinds(broken, pictures=False) == []
    assert kinds(record("a", "hi", "yes", "and?", " ")) == ["empty answer"]
    assert "not a sound record" in kinds(record("a", "<image>", "a cat"))


def test_records_are_compared_with_one_another():
    found = check_faults.Found("s")
    train = [record("1", "q", "a"), record("2", "q", "b"), record("1", "q", "c"), record("4", "q", "a")]
    contents = check_faults.of_records(train, found, None, 9)
    test = check_faults.of_records([record("t", "q", "b"), record("u", "q", "z")], check_faults.Found("t"), None, 9)
    check_faults.overlap(contents, test, found)
    told = {fault.what: (fault.count, fault.where) for fault in found.faults}
    assert told == {
        "id that stands more than once": (1, ("1: records 0 and 2",)),
        "identical rows": (1, ("4 and 1",)),
        "row of the test split": (1, ("2 is t of the test split",)),
    }


class Tokenizer:
    bos_token_id, unk_token_id = 5, 6
    added_tokens_decoder: ClassVar = {9: type("Token", (), {"special": True, "content": "<end>"})()}


def test_examples_are_looked_through():
    of = lambda tokens, learn: ([(np.array(tokens), np.array(learn, bool))], [], [], "ar")
    sound = of([5, 1, 2, 9], [0, 0, 1, 1])
    items = [sound, of([5, 5, 2, 9], [0, 0, 1, 1]), of([5, 1, 6, 9], [0, 0, 1, 1]), of([5, 1, 9, 2], [0, 0, 0, 1]),
             of([5, 1, 2, 9], [1, 0, 0, 0]), of([5, 1, 1, 1, 1, 9], [0, 0, 0, 0, 0, 1]), sound]  # fmt: skip
    found = check_faults.Found("made")
    check_faults.of_examples(worked.examples(items), Packing(row_tokens=5), Tokenizer(), found)
    assert {fault.what: fault.where for fault in found.faults} == {
        "two beginning tokens in one sequence": ("made/1",),
        "text that the vocabulary cannot spell": ("made/2",),
        "end of turn never learnt": ("made/3", "made/4"),
        "no token to learn from": ("made/4",),
        "longer than a row": ("made/5: 6 tokens, 0 patches, 1 learnt; a row holds 5, 0 and 5",),
    }


def test_pieces_hold_every_id_and_whole_characters():
    alef, smile = "ا".encode(), "🙂".encode()
    spelled = [Spelling("<s>"), Spelling(text=b" cat"), Spelling(text=alef[:1]), Spelling(text=alef[1:] + b"b"),
               Spelling("<pic>"), *[Spelling(text=smile[i : i + 1]) for i in range(4)], None]  # fmt: skip
    ids = [0, 1, 2, 3, 4, 4, 4, 1, 5, 6, 7, 8, 6, 1, 2, 4, 9]
    learn = [0, 0, 0, 1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0]
    found = check_rows.pieces(ids, learn, spelled, {4})
    assert [(p.text, p.ids, p.kind) for p in found] == [
        ("<s>", (0,), "special"), (" cat", (1,), "text"), ("اb", (2, 3), "text"), ("<pic>", (4, 4, 4), "picture"),
        (" cat", (1,), "text"), ("🙂", (5, 6, 7, 8), "text"), ("<9F>", (6,), "text"), (" cat", (1,), "text"),
        ("<D8>", (2,), "text"), ("<pic>", (4,), "picture"), ("<id 9 is no token>", (9,), "special"),
    ]  # fmt: skip
    assert [i for p in found for i in p.ids] == ids
    assert [p.learnt for p in found] == [False, False, True, False, True, True, True, True, False, False, False]


def test_pieces_of_a_real_tokenizer_spell_the_text(tokenizer):
    spelled = check_rows.spell(tokenizer)
    for text in ("ما هذه الكلمة؟ naïve 日本 🙂\n  two", "الحُرِّيَّةُ", "a\tb"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        found = check_rows.pieces(ids, [True] * len(ids), spelled, ())
        assert [i for piece in found for i in piece.ids] == ids
        assert "".join(piece.text for piece in found).removeprefix(" ") == text


def test_counts_and_lengths_are_those_of_the_examples():
    items = [worked.example(i, 4 + i, [(16, 8)] * (i % 3), group=("ar", "en")[i % 2]) for i in range(6)]
    source = worked.examples(items)
    found = {row.group: row for row in check_rows.counts(source)}
    assert list(found) == ["made/ar", "made/en", "all"]
    tokens = [len(pair[0][0]) for pair, *_ in items]
    for name, of in (("made/ar", (0, 2, 4)), ("made/en", (1, 3, 5)), ("all", range(6))):
        row = found[name]
        assert (row.examples, row.tokens) == (len(of), sum(tokens[i] for i in of))
        assert row.learnt == sum(int(items[i][0][0][1][1:].sum()) for i in of)
        assert (row.pictures, row.patches) == (sum(i % 3 for i in of), sum(i % 3 * 8 for i in of))
    lengths, longest = check_rows.lengths(source)
    assert (lengths[0], lengths[-1]) == (min(tokens), max(tokens)) and len(lengths) == len(check_rows.QUANTILES)
    assert longest[0] == (f"made/{int(np.argmax(tokens))}", max(tokens))


def test_chosen_examples_are_fixed_and_spread():
    assert check_rows.chosen(100, 5, 3) == check_rows.chosen(100, 5, 3) != check_rows.chosen(100, 5, 4)
    assert check_rows.chosen(3, 9, 0) == [0, 1, 2] and check_rows.chosen(0, 4, 0) == []


EXPERIMENT = """
Experiment.name = "checked"
Experiment.stages = ("instruct",)
Model.folder = "{base}"
Sources.files = {{{files}}}
Sources.workers = 1
Mixture.weights = {{{weights}}}
Packing.row_tokens = 40
Trainer.steps = 2
Trainer.rows = 1
Optimizer.learning_rate = 1e-3
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer_folder):
    """A published model of the tiny tokenizer; its weights are not there, for nothing but the data is asked for."""
    folder = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(tokenizer_folder, folder)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 33_000, "hidden_size": 32,
              "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "rms_norm_eps": 1e-5,
              "max_position_embeddings": 64, "eos_token_id": 2, "bos_token_id": 1}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def experiment(folder: Path, base: Path, *sources: str) -> str:
    path = folder / "checked.gin"
    files = ", ".join(f'"{name}": "{folder / name}.jsonl"' for name in sources)
    weights = ", ".join(f'"{name}": 1.0' for name in sources)
    path.write_text(EXPERIMENT.format(base=base, files=files, weights=weights))
    return str(path)


def lines(path: Path, *chats) -> None:
    turns = lambda chat: [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(chat)]
    rows = [{"id": f"r{i}", "messages": turns(chat), "language": "ar"} for i, chat in enumerate(chats)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_sound_experiment_passes_and_one_with_faults_does_not(tmp_path, base, capsys):
    lines(tmp_path / "sound.jsonl", ("ما هذا؟", "كتاب قديم"), ("اقرأ الكلمة", "الحرية"))
    lines(
        tmp_path / "odd.jsonl", ("ما هذا؟", "كتاب"), ("ما هذا؟", "كتاب"), ("?", "\ufe8d\ufedf"), ("x", "<b>\u202e</b>")
    )
    asked = ["--run_dir", str(tmp_path / "run"), "--rows", "2"]
    assert check.main([experiment(tmp_path, base, "sound"), *asked]) == 0
    told = capsys.readouterr().out
    assert "no fault found" in told and "كتاب قديم" in told and re.search("row [01] of 2: ", told)
    page = tmp_path / "pages" / "check.html"
    path = experiment(tmp_path, base, "odd")
    assert check.main([path, "--run_dir", str(tmp_path / "odd"), "--page", str(page), "--rows", "9"]) == 1
    told = capsys.readouterr().out
    assert "identical rows, 1" in told and "Arabic presentation forms, 1" in told and "3 faults found" in told
    assert "\u202e" not in told
    text = page.read_text("utf-8")
    html.parser.HTMLParser().feed(text)
    assert "://" not in text and "<script" not in text and "\u202e" not in text and "<b>" not in text
    assert "identical rows, 1" in text and ">&lt;" in text


def test_a_source_that_no_row_holds_is_a_fault(tmp_path, base, capsys):
    for name in ("often", "never"):
        lines(tmp_path / f"{name}.jsonl", (f"ما هذا {name}؟", "كتاب قديم"))
    path = experiment(tmp_path, base, "often", "never")
    rare = ["--set", 'instruct/Mixture.weights = {"often": 1.0, "never": 0.0001}']
    assert check.main([path, "--run_dir", str(tmp_path / "run"), *rare]) == 1
    told = " ".join(capsys.readouterr().out.split())
    assert "never drawn, 1" in told and "no example of it stands in the 2 rows of the stage" in told
    assert "1 fault found" in told


@pytest.mark.parametrize(
    "options, told",
    [
        (["--stage", "instrct"], "did you mean 'instruct'"),
        (["--source", "b"], "not in the mixture"),
        (["--set", "Trainer.step=1"], "did you mean 'steps'"),
    ],
)
def test_wrong_names_are_told(tmp_path, base, capsys, options, told):
    lines(tmp_path / "a.jsonl", ("ما هذا؟", "كتاب قديم"))
    path = experiment(tmp_path, base, "a")
    assert check.main([path, "--run_dir", str(tmp_path / "run"), *options]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_missing_things_are_told(tmp_path, base, capsys):
    assert check.main(["ain_minut"], experiments=Path(__file__).parents[2] / "experiments") == 2
    assert "did you mean 'ain_minute'" in capsys.readouterr().err
    assert check.main([experiment(tmp_path, base, "none"), "--run_dir", str(tmp_path / "run")]) == 1
    told = capsys.readouterr().out
    assert "the stage would stop" in told and "none.jsonl" in told and "Traceback" not in told


def test_running_text_is_isolated_and_harmless():
    piece = check_rows.Piece
    found = [piece("<s>", (0,), False, "special"), piece("الك", (1,), True), piece("لمة", (2,), True),
             piece("\x1b[31m", (3,), False), piece("<p>", (4, 4), False, "picture")]  # fmt: skip
    text = check_terminal.running(found)
    assert text.plain == "<s>\u2068الكلمة\u2069\ufffd[31m[picture, 2 places]"
    assert [str(span.style) for span in text.spans][:2] == [check_terminal.SPECIAL, check_terminal.LEARNT]
    page = str(check_page.running((piece("ا\nb", (7, 8), True), piece("<i>", (9,), False))))
    assert page.count('<p class="line"') == 2 and 'dir="rtl"' in page and "&lt;i&gt;" in page and 'title="7 8"' in page
    file = io.StringIO()
    Console(file=file, width=200).print(Text(check_terminal.isolated("a\x1b b")))
    assert "\x1b" not in file.getvalue()
