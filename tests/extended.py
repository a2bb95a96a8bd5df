"""A byte-level vocabulary of some 320 ids and its Arabic extension, as folders; a tiny model that goes with it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from ain_jax.models.config import ModelConfig, TextConfig
from ain_jax.models.multimodal import init_params
from ain_jax.tokenizer.extend import extend
from ain_jax.tokenizer.folder import Extension

ENGLISH = ["the cat sat on the mat and the dog sat on the cat", "a dog and a cat are on the mat", "the mat is that one"]
ARABIC = [
    "هذه الكلمة هي الحرية",
    "ما هذه الكلمة؟ هذه الكلمة هي الحرية",
    "الكتاب على الطاولة هذه",
    "كتاب الحرية على الطاولة",
]
PIECES = 24


@dataclass(frozen=True)
class Vocabulary:
    """Both tokenizers and the folders they lie in."""

    base_folder: Path
    extension: Extension
    old: tokenizers.Tokenizer
    new: tokenizers.Tokenizer

    @property
    def first(self) -> int:
        return self.extension.base_size

    @property
    def count(self) -> int:
        return self.extension.size - self.first


def vocabulary(folder: Path, pieces: int = PIECES) -> Vocabulary:
    """The base in `folder`/base, its extension by a special token and these pieces in `folder`/extended."""
    base = byte_level(folder / "base")
    extension = extend(base, ARABIC * 2, out_dir=folder / "extended", pieces=pieces, special_tokens=["<|new|>"])
    old, new = (tokenizers.Tokenizer.from_file(str(f / "tokenizer.json")) for f in (base, extension.folder))
    return Vocabulary(base, extension, old, new)


def byte_level(folder: Path, texts: tuple[str, ...] = tuple(ENGLISH), merges: int = 60) -> Path:
    """A folder with a byte-level BPE learnt from the texts: 256 bytes, two special tokens and these merges at most."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    made.decoder = decoders.ByteLevel()  # pyright: ignore
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = 258 + merges
    special: Any = ["<|end|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )  # pyright: ignore
    made.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True)
    made.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "chat_template": "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def model(rows: int, tied: bool = True, **settings: Any) -> tuple[dict[str, Any], ModelConfig]:
    """(params, config) of a random decoder of three layers."""
    sizes: dict[str, Any] = {"width": 32, "mlp_width": 64, "layers": 3, "heads": 4, "kv_heads": 2, "head_width": 8}
    text = TextConfig(
        vocabulary=rows,
        **(sizes | {"qkv_bias": False, "tied": tied, "rope_theta": 1000.0, "max_positions": 256} | settings),
    )
    config = ModelConfig(text, family="llama", eos_token_id=0)
    return init_params(config, jax.random.key(0)), config
