"""A GGUF file of llama.cpp -> the Hugging Face folder that its model was published as.

Nothing but the names and three habits of llama.cpp differ: it turns neighbouring rotary channels instead of the two
halves (architecture llama), stores a norm as 1 + w where the published model stores w (gemma3), and stores tensors in
blocks of 4 to 8 bits, which become float again here.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (lets numpy name bfloat16)
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ain_jax.weights.export import write_json

# metadata of the file, without its prefix: attribute of config.json; the last two are not in every file
SIZES = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
}
IDS = {
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}
# module of the file: published module
OUTSIDE = {"token_embd": "model.embed_tokens", "output": "model.embed_tokens", "output_norm": "model.norm"}
INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
INSIDE_GEMMA3 = INSIDE | {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
LAYERS = {"llama": INSIDE, "qwen2": INSIDE, "gemma3": INSIDE_GEMMA3}

# How the published tokenizers cut text before they merge bytes.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # kinds of token


def write_folder(gguf: Path, published: Mapping[str, Any], dtype: str, folder: Path) -> None:
    """Writes config, weights of one dtype and tokenizer; `published` holds the attributes that a GGUF file lacks."""
    from gguf import GGUFReader  # pyright: ignore[reportMissingImports]  (the extra [real])

    reader = GGUFReader(gguf)
    values = {name: field.contents() for name, field in reader.fields.items()}
    config = {**published, "torch_dtype": dtype, **sizes(values)}
    weights = {name: array.astype(dtype, copy=False) for name, array in tensors(reader.tensors, values)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {name: config[name] for name in IDS.values()})
    tokenizer(values).save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", tokenizer_config(values))


def sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of config.json that the file's metadata hold."""
    prefix = values["general.architecture"] + "."
    found = {theirs: values[prefix + ours] for ours, theirs in SIZES.items() if prefix + ours in values}
    # The file holds single precision; its shortest decimal is what was meant: 1e-05, not 9.999999747378752e-06.
    found = {name: float(str(np.float32(size))) if isinstance(size, float) else size for name, size in found.items()}
    ids = {theirs: values[ours] for ours, theirs in IDS.items()}
    return {**found, **ids, "vocab_size": len(values["tokenizer.ggml.tokens"])}


def tensors(stored: Sequence[Any], values: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """(published name, float32 array) of every tensor of a model whose head is the embedding."""
    from gguf import dequantize  # pyright: ignore[reportMissingImports]

    architecture = values["general.architecture"]
    heads = {
        "attn_q": values[f"{architecture}.attention.head_count"],
        "attn_k": values[f"{architecture}.attention.head_count_kv"],
    }
    # Some files hold the one table twice, the head's copy in more bits: that one is nearer to the model.
    unread = "token_embd.weight" if any(tensor.name == "output.weight" for tensor in stored) else None
    for tensor in stored:
        if tensor.name == unread:
            continue
        array = dequantize(tensor.data, tensor.tensor_type)
        module = tensor.name.split(".")[-2]
        if architecture == "llama" and module in heads:
            array = halves_from_pairs(array, heads[module])
        if architecture == "gemma3" and module.endswith("norm"):
            array = array - 1
        yield published_name(tensor.name, architecture), np.ascontiguousarray(array)


def published_name(name: str, architecture: str) -> str:
    """The name in model.safetensors: `blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    inside = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    outside = re.fullmatch(r"(\w+)\.(weight)", name)
    if inside and inside[2] in LAYERS[architecture]:
        return f"model.layers.{inside[1]}.{LAYERS[architecture][inside[2]]}.{inside[3]}"
    if outside and outside[1] in OUTSIDE:
        return f"{OUTSIDE[outside[1]]}.{outside[2]}"
    raise ValueError(f"tensor {name} has no published name in architecture {architecture}; extend the tables here")


def halves_from_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Each head's rows in the order of the halves that the published model turns together.

    stored     0 0' 1 1' 2 2'       (channel i turns with its neighbour i')
    published  0 1 2 0' 1' 2'
    """
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def tokenizer(values: Mapping[str, Any]) -> Tokenizer:
    """The published tokenizer, rebuilt from the pieces and merges (or scores) of the file."""
    pieces, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    kind_of_tokenizer = (values["tokenizer.ggml.model"], values["tokenizer.ggml.pre"])
    if kind_of_tokenizer == ("llama", "default"):
        # Runs of blanks are stored as they print; in the vocabulary they are runs of the mark.
        pieces = [re.sub("^ +$", lambda run: "▁" * len(run[0]), piece) for piece in pieces]
        made = _sentencepiece(pieces, kinds, values)
    else:
        made = _byte_level(pieces, kinds, values["tokenizer.ggml.merges"])
        if kind_of_tokenizer == ("gpt2", "smollm"):
            words = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        elif kind_of_tokenizer == ("gpt2", "qwen2"):
            made.normalizer = normalizers.NFC()
            words = [
                pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        else:
            raise ValueError(f"tokenizer {kind_of_tokenizer} is none of those known here; look how it cuts text")
        made.pre_tokenizer = pre_tokenizers.Sequence(words)
    made.add_tokens(
        [
            AddedToken(piece, special=kind == CONTROL, normalized=False)
            for piece, kind in zip(pieces, kinds, strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    return made


def _byte_level(pieces: Sequence[str], kinds: Sequence[int], merges: Sequence[str]) -> Tokenizer:
    vocabulary = {piece: i for i, (piece, kind) in enumerate(zip(pieces, kinds, strict=True)) if kind != UNUSED}
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    made.decoder = decoders.ByteLevel()
    return made


def _sentencepiece(pieces: Sequence[str], kinds: Sequence[int], values: Mapping[str, Any]) -> Tokenizer:
    """Byte-pair merges with the bytes themselves where no piece fits, a blank as `▁`, and <bos> before the text."""
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    # What a user defined is a piece of its own before anything is merged; its stored score says nothing.
    scores = [
        score if kind == NORMAL else 0.0 for score, kind in zip(values["tokenizer.ggml.scores"], kinds, strict=True)
    ]
    unknown = pieces[values["tokenizer.ggml.unknown_token_id"]]
    made = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges_of(vocabulary, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    start = values["tokenizer.ggml.bos_token_id"]
    made.post_processor = processors.TemplateProcessing(
        single=[pieces[start], "$A"],
        pair=[pieces[start], "$A", f"{pieces[start]}:1", "$B:1"],
        special_tokens=[(pieces[start], start)],
    )
    return made


def merges_of(vocabulary: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, the pieces of the highest score first, as transformers orders them."""
    found = []
    for piece, i in vocabulary.items():
        cuts = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        cuts = [(left, right) for left, right in cuts if left in vocabulary and right in vocabulary]
        cuts.sort(key=lambda cut: (vocabulary[cut[0]], vocabulary[cut[1]]))
        found += [(scores[i], left, right) for left, right in cuts]
    found.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(left, right) for _, left, right in found]


def tokenizer_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """`tokenizer_config.json`: special tokens and, where the model has one, its chat template."""
    pieces = values["tokenizer.ggml.tokens"]
    names = {**IDS, "tokenizer.ggml.unknown_token_id": "unk_token_id"}
    tokens = {theirs.removesuffix("_id"): pieces[values[ours]] for ours, theirs in names.items() if ours in values}
    template = values.get("tokenizer.chat_template")
    return {
        # The general class takes tokenizer.json as it is; in transformers 5 the named ones cut text in their own way.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokens,
        **({"chat_template": template} if template else {}),
        "clean_up_tokenization_spaces": False,
        "model_max_length": values[values["general.architecture"] + ".context_length"],
    }
