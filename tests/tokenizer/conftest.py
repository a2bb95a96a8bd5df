"""A small tokenizer with a chat template, made once for a file of tests."""

from pathlib import Path

import pytest

from ain_jax.tokenizer import chat
from ain_jax.tokenizer.chat import load_tokenizer
from ain_jax.tokenizer.extend import extend

BASE = Path(chat.__file__).parents[1] / "sample" / "tokenizer" / "mistral_v1.model"
TEXTS = ["ما هذه الكلمة؟ هذه الكلمة هي الحرية", "اقرأ الكلمة", "هذه هي الحرية"] * 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return extend(BASE, TEXTS, out_dir=tmp_path_factory.mktemp("chat") / "t", pieces=15).folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture
def template(folder):
    """The tokenizer with another template."""

    def with_template(text):
        tokenizer = load_tokenizer(folder)
        tokenizer.chat_template = text
        return tokenizer

    return with_template
