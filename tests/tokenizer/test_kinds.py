"""Kinds of text by their stated rules, on sentences of each."""

import pytest

from ain_jax.tokenizer import kinds

PLAIN = "ذهب الولد إلى المدرسة في الصباح"
VOCALISED = "ذَهَبَ الْوَلَدُ إِلَى الْمَدْرَسَةِ"


@pytest.mark.parametrize(
    ("text", "language", "kind"),
    [
        (PLAIN, "ar", kinds.PLAIN),
        ("شكراً جزيلاً لكم جميعاً أيها الناس", "ar", kinds.PLAIN),  # three tanwins on 28 letters
        (VOCALISED, "ar", kinds.VOCALISED),
        (VOCALISED, "arz", kinds.VOCALISED),  # the marks say more than the label
        (PLAIN, "arz", kinds.DIALECT),
        (PLAIN, "ary-Arab", kinds.DIALECT),
        (PLAIN, "arb", kinds.PLAIN),  # the standard language
        ("نظام تشغيل Debian على الخادم", "ar", kinds.CODE_MIXED),
        (PLAIN + PLAIN + " SQL", "ar", kinds.PLAIN),  # 3 of 53 letters
        ("the house", "en", kinds.PLAIN),
        ("2024 / 10", "ar", kinds.PLAIN),
        ("", "ar", kinds.PLAIN),
    ],
)
def test_kind_of(text, language, kind):
    assert kinds.kind_of(text, language) == kind


def test_a_tenth_is_code_mixed_and_less_is_not():
    assert kinds.kind_of("ا" * 9 + "a") == kinds.CODE_MIXED
    assert kinds.kind_of("ا" * 10 + "a") == kinds.PLAIN


def test_one_mark_on_five_letters_is_vocalised_and_one_on_six_is_not():
    assert kinds.kind_of("ببببب\u064e") == kinds.VOCALISED
    assert kinds.kind_of("بببببب\u064e") == kinds.PLAIN


def test_numbers():
    assert list(kinds.numbers("عام 2024 أو ٢٠٢٤ و۱۲")) == [
        (kinds.DIGITS, "2024"),
        (kinds.ARABIC_DIGITS, "٢٠٢٤"),
        (kinds.ARABIC_DIGITS, "۱۲"),
    ]


def test_mostly_arabic():
    assert kinds.mostly_arabic("السلام hi") and not kinds.mostly_arabic("hello من") and not kinds.mostly_arabic("12")
