"""Published models in small, with random weights, as the folders that their makers publish.

Each has its family's architecture, kind of tokenizer, special tokens and chat template, and no more knowledge than its
seed: an experiment that begins with it takes every step that it takes with the published one.
"""

import dataclasses
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from ain_jax import sample
from ain_jax.data.images import CLIP_MEAN, CLIP_STD, ImageSettings
from ain_jax.models import hf_families
from ain_jax.models.config import ClipConfig, ModelConfig, published
from ain_jax.models.multimodal import init_params
from ain_jax.tokenizer import folder as tokenizer_files
from ain_jax.tokenizer import templates
from ain_jax.weights.export import export_folder, write_json
from ain_jax.weights.shards import DTYPES, write
from ain_jax.weights.table import published as places
from ain_jax.weights.table import rearrange, sizes, their_shape

SEED = 0
PIECES = 1900  # of byte-level vocabularies, before special tokens
# How published tokenizers cut text before they merge bytes.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA_3.replace("{1,3}", "")


@dataclasses.dataclass(frozen=True)
class Kind:
    """How one family's tokenizer is made, in small."""

    special_tokens: tuple[str, ...]  # behind the pieces, in this order
    named: dict[str, str]  # bos_token, eos_token, pad_token
    template: str = ""  # of ours, as the family's published one
    regex: str = QWEN2


QWEN2_TOKENS = ("<|endoftext|>", *templates.CHATML)
QWEN2_NAMED = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
LLAMA_3_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", *templates.LLAMA3)
KINDS = {
    "llama_3_twin": Kind(
        LLAMA_3_TOKENS, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}, "llama3", LLAMA_3
    ),
    # Gemma's own tokenizer is a SentencePiece model; what matters here are its tokens and its template.
    "gemma_twin": Kind(
        ("<pad>", "<eos>", "<bos>", *templates.GEMMA),
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
        "gemma",
    ),
    "qwen2_twin": Kind(QWEN2_TOKENS, QWEN2_NAMED, "chatml"),
    "qwen2_vl_twin": Kind((*QWEN2_TOKENS, *templates.VISION), QWEN2_NAMED, "qwen2_vl"),
}


NAMES = ("llama_2_twin", *KINDS)


def write_models(out: Path, names: Sequence[str] = NAMES) -> list[Path]:
    """A folder of each: out/llama_2, out/qwen2_vl ..., and out/clip."""
    return [*(_write(name, out) for name in names), _clip(out / "clip")]


def _write(name: str, out: Path) -> Path:
    config, place = published(name), out / name.removesuffix("_twin")
    beside = out / f"{place.name}.tokenizer"
    beside.mkdir(parents=True, exist_ok=True)
    made = _byte_level(beside, KINDS[name]) if name in KINDS else _sentencepiece(beside)
    config = dataclasses.replace(config, **made)
    images = ImageSettings() if config.vision else None
    card = f"# {place.name} in small\n\nRandom weights, seed {SEED}: `python -m ain_jax.twins` made them.\n"
    export_folder(init_params(config, _key(name)), config, beside, images, place, model_card=card)
    for file in beside.iterdir():
        file.unlink()
    beside.rmdir()
    return place


def _key(name: str) -> Any:
    return jax.random.key(zlib.crc32(f"{SEED}/{name}".encode()))


def _sentencepiece(place: Path) -> dict[str, Any]:
    """Llama-2's kind of tokenizer: Mistral's first one, of 32,000 pieces too; the ids of a model's config."""
    source = sample.FOLDER / "tokenizer" / "mistral_v1.model"
    (place / "tokenizer.model").write_bytes(source.read_bytes())
    write_json(place / "tokenizer.json", tokenizer_files.tokenizer_json(tokenizer_files.read_model(source)))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(place / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | named)
    return {"bos_token_id": 1, "eos_token_id": 2}


def _byte_level(place: Path, kind: Kind) -> dict[str, Any]:
    """A byte-level BPE learnt from the sample, with the family's special tokens; the ids of a model's config."""
    made = tokenizers.Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
    split = pre_tokenizers.Split(tokenizers.Regex(kind.regex), "isolated")
    steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    made.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=PIECES, initial_alphabet=alphabet, show_progress=False)  # pyright: ignore
    made.train_from_iterator(_texts(), trainer)
    made.add_special_tokens(list(kind.special_tokens))
    made.save(str(place / "tokenizer.json"))
    text = templates.named(kind.template).text
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": text} | kind.named
    (place / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
    ids: dict[str, Any] = {f"{name}_id": made.token_to_id(token) for name, token in kind.named.items()}
    seen = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    seen |= {name: f"<|{name}|>" for name in ("vision_start", "vision_end")}
    return ids | {f"{n}_token_id": made.token_to_id(t) for n, t in seen.items() if t in kind.special_tokens}


def _texts() -> Sequence[str]:
    """English mostly, as the published tokenizers are learnt from: there is something to gain by an extension."""
    english = [row["en"] for row in (*sample.rows("udhr"), *sample.rows("handbook")[:200])]
    return [*english, *(row["ar"] for row in sample.rows("udhr")[:20])]


def _clip(place: Path) -> Path:
    """A CLIP's image encoder by itself, as transformers saves it."""
    config: ModelConfig = published("pangea_twin")
    vision = config.vision
    assert isinstance(vision, ClipConfig)
    params = init_params(config, _key("clip"), part="visual")
    letters, prefix = sizes(config), "vision_tower."
    arrays = {}
    for tensor in places(config):
        if tensor.name.startswith(prefix):
            leaf: Any = {**params}
            for part in tensor.path.split("/"):
                leaf = leaf[part]
            ours = leaf if tensor.layer is None else leaf[tensor.layer]
            array = rearrange(jax.device_get(ours), tensor.layout, letters, reverse=True)
            assert array.shape == their_shape(tensor.layout, letters)
            arrays[tensor.name.removeprefix(prefix)] = array
    place.mkdir(parents=True, exist_ok=True)
    entries = {name: (DTYPES["F32"], array.shape) for name, array in arrays.items()}
    write(place / "model.safetensors", entries, arrays.values())
    attributes = {theirs: getattr(vision, ours) for theirs, ours in hf_families.CLIP.items()}
    head = {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "projection_dim": 16}
    write_json(place / "config.json", head | attributes | {"torch_dtype": "float32"})
    side = vision.tile
    processor = {"image_processor_type": "CLIPImageProcessor", "crop_size": side, "size": {"shortest_edge": side}}
    colours = {"image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD)}
    write_json(place / "preprocessor_config.json", processor | colours)
    return place
