"""Small bases of both kinds, trained on the sample in a second, in the forms in which published ones come."""

import json
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from ain_jax import sample

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MISTRAL = sample.FOLDER / "tokenizer" / "mistral_v1.model"
# the beginning of the handbook and the Declaration's paragraphs
ARABIC = [row["ar"] for row in (*sample.rows("udhr"), *sample.rows("handbook")[:150])]
ENGLISH = [row["en"] for row in (*sample.rows("udhr"), *sample.rows("handbook")[:200])]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level(
    folder: Path, size: int = 700, regex: str | None = LLAMA_3, norm: Any = None, gaps: bool = False, **model: Any
) -> Path:
    """A folder as Qwen2's: byte-level BPE, its special tokens behind the vocabulary, a template, ChatML's tokens.

    gaps: the special tokens lie four ids behind the vocabulary, as some published ones do.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None)
    if regex is None:  # as SmolLM2: digits alone, GPT-2's own expression
        steps = [pre_tokenizers.Digits(individual_digits=True), split]
    else:
        steps = [pre_tokenizers.Split(tokenizers.Regex(regex), "isolated"), split]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    if norm is not None:
        tokenizer.normalizer = norm
    trainer = trainers.BpeTrainer(
        vocab_size=size, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(ENGLISH[:120] + ARABIC[:12], trainer)
    data = json.loads(tokenizer.to_str())
    data["model"] |= model
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    first = len(data["model"]["vocab"])
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>")
    data["added_tokens"] = [
        {"id": first + index, "content": name, **plain, "special": name != "<think>"}
        for index, name in enumerate(names)
    ]
    if gaps:
        for token in data["added_tokens"]:
            token["id"] += 4
            data["model"]["vocab"][token["content"]] = token["id"]
    return _written(folder, data, "Qwen2Tokenizer")


def llama_like(folder: Path, spelling: str = "text") -> Path:
    """A folder as Llama-2's in registries: BPE over ▁ with byte fallback, as tokenizer.json alone, a BOS in front."""
    folder.mkdir(parents=True, exist_ok=True)
    data = _sentencepiece_json(sentencepiece_model(folder))
    (folder / "base.model").unlink()
    if spelling == "text":
        data["model"]["merges"] = [" ".join(merge) for merge in data["model"]["merges"]]
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"SpecialToken": {"id": "<s>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": pair,
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    return _written(folder, data, "LlamaTokenizer", template=None)


def both_forms(folder: Path) -> Path:
    """A folder with a SentencePiece model and the tokenizer.json that fits it."""
    folder.mkdir(parents=True, exist_ok=True)
    model = sentencepiece_model(folder)
    _written(folder, _sentencepiece_json(model), "LlamaTokenizer", template=None)
    return Path(model.rename(folder / "tokenizer.model")).parent


def sentencepiece_model(folder: Path, **options: Any) -> Path:
    """A SentencePiece BPE of 600 pieces with byte fallback."""
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text.txt"
    text.write_text("\n".join(ENGLISH[:120] + ARABIC[:3]), encoding="utf-8")
    settings: dict[str, Any] = {"model_type": "bpe", "vocab_size": 600, "byte_fallback": True, "minloglevel": 2}
    settings |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False} | options
    sentencepiece.SentencePieceTrainer.Train(input=str(text), model_prefix=str(folder / "base"), **settings)
    text.unlink()
    (folder / "base.vocab").unlink()
    return folder / "base.model"


def _sentencepiece_json(model: Path) -> dict[str, Any]:
    """What transformers makes of the model: its own conversion, so that ours has something to be compared with."""
    from ain_jax.tokenizer.folder import read_model, tokenizer_json

    data = tokenizer_json(read_model(model))
    data["normalizer"] = json.loads(_legacy().to_str())["normalizer"]
    data["pre_tokenizer"] = None
    return data


def _legacy() -> tokenizers.Tokenizer:
    """Llama-2's way to put the blank in front."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)  # pyright: ignore
    return tokenizer


def _written(folder: Path, data: dict[str, Any], name: str, template: str | None = TEMPLATE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    config: dict[str, Any] = {"tokenizer_class": name, "model_max_length": 4096}
    if template is None:
        config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    else:
        config |= {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": template}
        config["clean_up_tokenization_spaces"] = True  # as Llama-3's, which loses blanks before full stops
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


__all__ = [
    "ARABIC", "ENGLISH", "LLAMA_3", "MISTRAL", "TEMPLATE",
    "both_forms", "byte_level", "llama_like", "sentencepiece_model",
]  # fmt: skip
