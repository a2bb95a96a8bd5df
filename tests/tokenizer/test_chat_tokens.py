"""Which tokens cover a span of characters: by the sizes of their pieces as by the tokenizer's own offsets."""

import json

import numpy as np
import pytest
import tiny_bases
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from ain_jax.tokenizer import chat_tokens
from ain_jax.tokenizer.chat import load_tokenizer

WORDS = st.text(st.sampled_from("ab eth\n ,1éقطة日🙂"), max_size=30)


@pytest.fixture(scope="module", params=["byte_level", "trimmed", "llama_like"])
def tokenizer(request, tmp_path_factory):
    kind = {"trimmed": "byte_level"}.get(request.param, request.param)
    made = getattr(tiny_bases, kind)(tmp_path_factory.mktemp("tokens") / "base")
    if request.param == "trimmed":  # Llama-3's offsets leave the blank before a word out
        path = made / "tokenizer.json"
        trim = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"post_processor": trim}), "utf-8")
    # Not by its family's class, which transformers may build anew with other ids.
    return PreTrainedTokenizerFast(tokenizer_file=str(made / "tokenizer.json"))


def by_sizes(tokenizer, text, spans):
    ids = chat_tokens.encode(tokenizer, [text])[0].ids
    return chat_tokens._by_sizes(text, spans, ids, chat_tokens._pieces(tokenizer))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(WORDS, st.booleans()), min_size=1, max_size=4), st.data())
def test_sizes_and_offsets_agree(tokenizer, pieces, data):
    special = data.draw(st.sampled_from(["", *(token.content for token in tokenizer.added_tokens_decoder.values())]))
    text, spans = special, []
    for words, learnt in pieces:
        if learnt:
            spans.append((len(text), len(text + words + special)))
        text += words + special
    expected = chat_tokens._by_offsets(spans, chat_tokens.encode(tokenizer, [text], offsets=True)[0])
    ((ids, covered),) = chat_tokens.encode_spans(tokenizer, [(text, spans)])
    np.testing.assert_array_equal(ids, expected[0])
    np.testing.assert_array_equal(covered, expected[1])
    found = by_sizes(tokenizer, text, spans)
    if found is not None:
        np.testing.assert_array_equal(found[1], expected[1])


def test_a_worked_span(tmp_path):
    """The byte-level base keeps every text whole, so that sizes say it all; a span inside a token takes the token."""
    tokenizer = load_tokenizer(tiny_bases.byte_level(tmp_path / "base"))
    end = tokenizer.eos_token
    text = f"é cat{end}\n"
    ids, covered = by_sizes(tokenizer, text, [(2, 5 + len(end))]) or pytest.fail("the sizes say nothing")
    learnt = tokenizer.convert_ids_to_tokens(ids[covered])
    assert "".join(learnt).lstrip("Ġ") == f"cat{end}" and covered.sum() < len(ids)


def test_texts_that_sizes_cannot_tell_are_told_by_offsets(tmp_path, monkeypatch):
    """Of two texts in a batch the second ends its span in a blank."""
    tokenizer = load_tokenizer(tiny_bases.byte_level(tmp_path / "base"))
    asked, way = [], chat_tokens.encode
    monkeypatch.setattr(chat_tokens, "encode", lambda t, x, offsets=False: asked.append(offsets) or way(t, x, offsets))
    results = chat_tokens.encode_spans(tokenizer, [("the cat.", [(4, 8)]), ("the cat ", [(4, 8)])])
    assert asked == [False, False, True]
    assert all(ids[covered].size for ids, covered in results)


def test_an_added_token_is_seen(tmp_path):
    tokenizer = load_tokenizer(tiny_bases.byte_level(tmp_path / "base"))
    assert by_sizes(tokenizer, "a|new|b.", [(6, 8)]) is not None
    tokenizer.add_tokens(["|new|"])
    ids, covered = by_sizes(tokenizer, "a|new|b.", [(6, 8)]) or pytest.fail("the added token has no size")
    assert len(ids) == 4 and covered.tolist() == [False, False, True, True]
