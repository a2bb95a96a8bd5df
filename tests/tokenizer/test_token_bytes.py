"""Bytes by id: summed over the ids of a text they give the bytes of the text, for both kinds of tokenizer."""

import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from ain_jax.tokenizer.align import token_bytes

TEXTS = ("the old cat sat on the mat", "القط القديم على الحصيرة", "naïve café 2024")


def byte_level():
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>"],
        show_progress=False,
    )  # pyright: ignore
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def sentencepiece_like():
    pieces = [
        "<unk>",
        "<s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "▁",
        "t",
        "h",
        "e",
        "th",
        "the",
        "▁the",
        "ا",
        "ل",
        "ال",
    ]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("ا", "ل")]
    model = models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")  # pyright: ignore
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])  # pyright: ignore
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    return tokenizer


KINDS = {"byte-level": byte_level(), "SentencePiece": sentencepiece_like()}


@settings(deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.text())
def test_the_ids_of_a_text_add_up_to_its_bytes(kind, text):
    tokenizer = KINDS[kind]
    tokenizer.encode_special_tokens = True
    if kind == "SentencePiece":
        text = text.replace("▁", " ")  # such a tokenizer reads ▁ as a blank
    text = text.encode("utf-8", "ignore").decode()
    bytes_V = token_bytes(tokenizer, 600)
    assert bytes_V[tokenizer.encode(text, add_special_tokens=False).ids].sum() == len(text.encode())


def test_special_tokens_and_rows_without_an_id_count_nothing():
    tokenizer = KINDS["byte-level"]
    tokenizer.add_tokens(["extra word"])
    bytes_V = token_bytes(tokenizer, 600)
    assert bytes_V[tokenizer.token_to_id("<s>")] == 0
    assert bytes_V[tokenizer.token_to_id("extra word")] == len("extra word")
    assert not bytes_V[tokenizer.get_vocab_size() :].any()
