"""Rows of text: plain, in two languages, and beside a picture."""

import hashlib
from collections.abc import Mapping
from typing import Any

from ain_jax.data.files_text import short
from ain_jax.data.formats import IMAGE
from ain_jax.data.forms_fields import Draft, first, identity, text
from ain_jax.data.languages import is_language, language_code

TEXT = ("text", "content", "raw_content", "document", "article", "body")
CAPTION = ("txt", "caption", "captions", "alt_text", "text")
# Columns of the first and of the second side, and of their languages.
SIDES = (
    ("source", "target"),
    ("src", "tgt"),
    ("source_text", "target_text"),
    ("src_text", "tgt_text"),
    ("source_sentence", "target_sentence"),
    ("sentence1", "sentence2"),
    ("sourceText", "targetText"),
)
SIDE_LANGUAGES = (
    ("source_lang", "target_lang"),
    ("src_lang", "tgt_lang"),
    ("source_language", "target_language"),
    ("sourceLang", "targetLang"),
    ("sourceLanguage", "targetLanguage"),
)
NO_LANGUAGE = ("id", "no")  # Indonesian and Norwegian as columns are names and numbers far more often


def read_text(values: Mapping[str, Any], draft: Draft) -> None:
    """A document to continue, in the column `text`, or one of TEXT."""
    draft.kind = "text"
    draft.text = text(values, TEXT, draft)


def read_caption(values: Mapping[str, Any], draft: Draft) -> None:
    """A picture and what is to be said of it: the user shows it without a word, the caption is the answer."""
    draft.kind = "caption"
    draft.say("user", IMAGE)
    name = first(values, CAPTION)
    value = values.get(name)
    if isinstance(value, list) and value:  # several captions: the first, so that a picture is shown once
        values = {**values, name: value[0]}
    draft.say("assistant", text(values, CAPTION, draft).strip())


def read_parallel(values: Mapping[str, Any], draft: Draft) -> None:
    """Both sides in one text, a line break between them, in an order drawn from the text itself.

    The languages are those of the columns, English last: "ar-en".
    """
    draft.kind = "parallel"
    found = sides(values)
    if len(found) != 2:
        told = f"found {', '.join(language or 'one side' for language, _ in found) or 'none'}"
        draft.found.append(f"two sides are expected, as {{'ar': ..., 'en': ...}} or source and target; {told}")
        return
    for i, (language, side) in enumerate(found):
        name = language or ("the first side", "the second side")[i]
        if not isinstance(side, str):
            draft.found.append(f"{name} = {short(side)}: expected text")
        elif not side.strip():
            draft.found.append(f"{name} is empty; expected text that is not blank")
    if draft.found:
        return
    languages = sorted((language for language, _ in found), key=lambda language: language == "en")
    draft.language = "-".join(languages) if all(languages) else ""
    words = [side.strip() for _, side in found]
    seed = identity(values) or "\n".join(words)
    if hashlib.sha256(seed.encode("utf-8", "replace")).digest()[0] & 1:
        words.reverse()
    draft.text = "\n".join(words)


def sides(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(language code, text) of each side; the code is "" where the row does not tell it."""
    inner = values.get("translation", values.get("translations"))
    if isinstance(inner, Mapping):
        if isinstance(inner.get("language"), list) and isinstance(inner.get("translation"), list):  # datasets' variable
            return [(language_code(str(k)), v) for k, v in zip(inner["language"], inner["translation"], strict=False)]
        return [(language_code(str(key)), value) for key, value in inner.items() if value is not None]
    for names in SIDES:
        if all(values.get(name) is not None for name in names):
            for tongues in SIDE_LANGUAGES:
                if all(isinstance(values.get(name), str) for name in tongues):
                    return [(language_code(values[k]), values[name]) for k, name in zip(tongues, names, strict=True)]
            return [("", values[name]) for name in names]
    return [
        (language_code(key), value)
        for key, value in values.items()
        if isinstance(key, str) and value is not None and key not in NO_LANGUAGE and is_language(key)
    ]
