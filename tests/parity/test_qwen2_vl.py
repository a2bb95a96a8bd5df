"""Our Qwen2-VL against transformers': the same weights, the same numbers, in float32.

Logits to 1e-4, modules to 1e-5. The logits have a standard deviation of 1 or more, and switching off any one feature
moves them by 100 tolerances or more: a test that such a switch cannot fail would test nothing.
"""

import dataclasses
import importlib.util
import itertools
from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ain_jax.data.images import ImageSettings
from ain_jax.data.positions import patch_positions
from ain_jax.generate import Prompt, generate, prompt_positions, rows_of
from ain_jax.models.layers import text_rotary
from ain_jax.models.multimodal import MultimodalModel, packed
from ain_jax.models.text import DecoderLayer
from ain_jax.models.vision import VisionTower
from ain_jax.weights.export import export_folder
from ain_jax.weights.load import load_folder

torch = pytest.importorskip("torch")
LOGITS, MODULE = 1e-4, 1e-5
L, P = 32, 48  # of our rows


def theirs(reference, conversation):
    """logits_LV of transformers, and what its forward was given."""
    ids = torch.tensor([conversation.tokens])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    first = 0
    for grid in conversation.grids:
        video = grid[0] > 1
        pixels, shape = ("pixel_values_videos", "video_grid_thw") if video else ("pixel_values", "image_grid_thw")
        last = first + int(np.prod(grid))
        for name, value in ((pixels, torch.tensor(conversation.patches[first:last])), (shape, torch.tensor([grid]))):
            inputs[name] = torch.cat([inputs[name], value]) if name in inputs else value
        first = last
    if conversation.grids:
        kinds = (ids == reference.config.image_token_id).int() + 2 * (ids == reference.config.video_token_id).int()
        inputs["mm_token_type_ids"] = kinds
    with torch.no_grad():
        return reference.model(**inputs).logits[0].numpy(), inputs


@lru_cache
def compiled(config):
    model = MultimodalModel(config)

    def logits(params, arrays):
        return model.apply({"params": params}, model.apply({"params": params}, **arrays), method="logits")

    return jax.jit(logits)


def row(config, conversation):
    prompt = Prompt(conversation.tokens, conversation.patches, conversation.grids)
    arrays = rows_of([prompt], config, 1, L, P if conversation.grids else 0)
    return {name: array for name, array in arrays.items() if name not in ("length_B", "next_position_B")}


def ours(config, params, arrays, length):
    return np.asarray(compiled(config)(params, arrays))[0, :length]


def test_logits_are_equal(reference, talk):
    params, config = load_folder(reference.folder)
    assert config == reference.config
    for name, conversation in talk(config).items():
        expected, _ = theirs(reference, conversation)
        found = ours(config, params, row(config, conversation), len(conversation.tokens))
        assert expected.std() >= 1, "weights too small to test with"
        np.testing.assert_allclose(found, expected, atol=LOGITS, rtol=0, err_msg=name)


def test_packed_conversations_equal_transformers_alone(untied, talk):
    params, config = load_folder(untied.folder)
    arrays, spans, given = pack(config, talk(config).values())
    found = np.asarray(compiled(config)(params, arrays))[0]
    for span, conversation in zip(spans, given, strict=True):
        np.testing.assert_allclose(found[span], theirs(untied, conversation)[0], atol=LOGITS, rtol=0)


def pack(config, given):
    """One row of all conversations."""
    rows = [row(config, conversation) for conversation in given]
    lengths = [len(conversation.tokens) for conversation in given]
    counts = [sum(int(np.prod(grid)) for grid in conversation.grids) for conversation in given]
    patches = np.concatenate([[0], np.cumsum(counts)])
    for number, (arrays, first) in enumerate(zip(rows, patches, strict=False)):
        arrays["segments_BL"] = arrays["segments_BL"] * (number + 1)
        if "patch_segments_BP" in arrays:
            arrays["feature_index_BL"] = np.where(
                arrays["feature_index_BL"] < 0, -1, arrays["feature_index_BL"] + first // 4
            )
            arrays["patch_segments_BP"] = arrays["patch_segments_BP"] + 10 * (number + 1)
        else:
            arrays["feature_index_BL"] = np.full((1, L), -1, np.int32)

    def join(name, axis, sizes):
        present = [(arrays[name], size) for arrays, size in zip(rows, sizes, strict=True) if name in arrays]
        return np.concatenate([np.take(array, range(size), axis) for array, size in present], axis)

    text = ("tokens_BL", "segments_BL", "feature_index_BL")
    vision = ("patches_BPK", "patch_positions_BP2", "patch_segments_BP")
    joined = {name: join(name, 1, lengths) for name in text} | {name: join(name, 1, counts) for name in vision}
    joined["positions_3BL"] = join("positions_3BL", 2, lengths)
    edges = np.concatenate([[0], np.cumsum(lengths)])
    return joined, [slice(a, b) for a, b in itertools.pairwise(edges)], list(given)


def without_bias(params):
    attention = params["model"]["layers"]["self_attn"]
    bare = {name: part | {"bias": part["bias"] * 0} if "bias" in part else part for name, part in attention.items()}
    layers = params["model"]["layers"] | {"self_attn": bare}
    return params | {"model": params["model"] | {"layers": layers}}


SWITCHES = {
    "M-RoPE": lambda p, a: (p, a | {"positions_3BL": np.broadcast_to(np.arange(L, dtype=np.int32), (3, 1, L))}),
    "the order of the axes of M-RoPE": lambda p, a: (p, a | {"positions_3BL": a["positions_3BL"][::-1]}),
    "picture features": lambda p, a: (p, a | {"feature_index_BL": np.full((1, L), -1, np.int32)}),
    "the order of picture features": lambda p, a: (p, a | {"feature_index_BL": np.minimum(a["feature_index_BL"], 0)}),
    "patch positions": lambda p, a: (p, a | {"patch_positions_BP2": a["patch_positions_BP2"] * 0}),
    "patch segments": lambda p, a: (p, a | {"patch_segments_BP": np.minimum(a["patch_segments_BP"], 1)}),
    "segments": lambda p, a: (
        p,
        a | {"segments_BL": np.where(np.arange(L)[None] < 6, 2, a["segments_BL"]).astype(np.int32)},
    ),
    "biases of q, k and v": lambda p, a: (without_bias(p), a),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_feature_is_felt(untied, talk, switch):
    params, config = load_folder(untied.folder)
    conversation = talk(config)["two uneven pictures"]
    arrays = row(config, conversation)
    before = ours(config, params, arrays, len(conversation.tokens))
    after = ours(config, *SWITCHES[switch](params, arrays), len(conversation.tokens))
    assert np.abs(after - before).max() >= 100 * LOGITS


def test_a_packed_row_without_its_segment_mask_is_wrong(untied, talk):
    params, config = load_folder(untied.folder)
    arrays, spans, given = pack(config, talk(config).values())
    found = np.asarray(compiled(config)(params, arrays | {"segments_BL": np.minimum(arrays["segments_BL"], 1)}))[0]
    assert np.abs(found[spans[1]] - theirs(untied, given[1])[0]).max() >= 100 * LOGITS


def test_positions_equal_get_rope_index(reference, talk):
    for conversation in talk(reference.config).values():
        if not conversation.grids:
            continue
        _, inputs = theirs(reference, conversation)
        named = {k: v for k, v in inputs.items() if k.endswith("grid_thw") or k == "mm_token_type_ids"}
        expected, _ = reference.model.model.get_rope_index(inputs["input_ids"], **named)
        found = prompt_positions(Prompt(conversation.tokens, grids=conversation.grids), reference.config)
        assert np.array_equal(found, expected[:, 0].numpy())


@pytest.mark.parametrize("name", ["two uneven pictures", "a video behind a picture"])
def test_the_image_encoder_is_equal(reference, talk, name):
    params, config = load_folder(reference.folder)
    conversation = talk(config)[name]
    with torch.no_grad():
        output = reference.model.model.visual(torch.tensor(conversation.patches), torch.tensor(conversation.grids))
    expected_MD = output.pooler_output.numpy()
    tower = VisionTower(config.vision, config.text.width)
    positions = np.concatenate([patch_positions(grid) for grid in conversation.grids])
    frames = [rows * columns for frames, rows, columns in conversation.grids for _ in range(frames)]
    segments = np.repeat(np.arange(len(frames), dtype=np.int32) + 1, frames)
    inputs = (conversation.patches[None], positions[None], segments[None])
    found_MD = jax.jit(tower.apply)({"params": params["visual"]}, *inputs)[0]
    assert expected_MD.std() > 0.3
    np.testing.assert_allclose(found_MD, expected_MD, atol=MODULE, rtol=0)


def test_a_decoder_layer_is_equal(reference):
    params, config = load_folder(reference.folder)
    x_BLD = np.random.default_rng(1).normal(size=(2, 9, config.text.width)).astype(np.float32)
    positions_3BL = np.random.default_rng(2).integers(0, 20, (3, 2, 9)).astype(np.int32)
    text = reference.model.model.language_model
    with torch.no_grad():
        embeddings = text.rotary_emb(torch.tensor(x_BLD), torch.tensor(positions_3BL))
        mask = torch.full((9, 9), -torch.inf).triu(1)[None, None]
        expected = text.layers[1](torch.tensor(x_BLD), attention_mask=mask, position_embeddings=embeddings)
    expected_BLD = (expected[0] if isinstance(expected, tuple) else expected).numpy()
    rotary = text_rotary(
        jnp.asarray(positions_3BL), config.text.head_width, config.text.rope_theta, config.text.mrope_section
    )
    layer = DecoderLayer(config.text, packed(jnp.ones((2, 9), jnp.int32)))
    second = jax.tree.map(lambda leaf: leaf[1], params["model"]["layers"])
    found_BLD, _ = jax.jit(partial(layer.apply, memory=None))({"params": second}, x_BLD, rotary)
    np.testing.assert_allclose(found_BLD, expected_BLD, atol=MODULE, rtol=0)


def test_greedy_decoding_is_equal_token_for_token(reference, talk):
    params, config = load_folder(reference.folder)
    given = list(talk(config).values())
    expected = []
    for conversation in given:
        _, inputs = theirs(reference, conversation)
        new = reference.model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        expected.append(new[0, len(conversation.tokens) :].tolist())
    prompts = [Prompt(conversation.tokens, conversation.patches, conversation.grids) for conversation in given]
    assert generate(params, config, prompts, 12) == expected


def write_tokenizer(folder: Path) -> dict[str, int]:
    """A byte-level tokenizer with the special tokens of Qwen2-VL behind the 256 bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from ain_jax.tokenizer.chat import CHATML_TEMPLATE

    special = [
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
        "<|pad|>",
    ]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=[token for token in special if token not in ("<|im_end|>", "<|pad|>")],
        chat_template=CHATML_TEMPLATE,
    )
    fast.save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'))
    return {token: tokenizer.token_to_id(token) for token in special}


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_an_exported_folder_is_opened_to_the_same_model(tmp_path, build, tied):
    """Through the programs that run it with transformers 4.51 too: ids, pixels and logits."""
    from ain_jax.models.config import tiny

    ids = write_tokenizer(tmp_path / "tokenizer")
    names = {
        "image": "image_pad",
        "video": "video_pad",
        "vision_start": "vision_start",
        "vision_end": "vision_end",
        "eos": "im_end",
    }
    config = tiny(vocabulary=264, tied=tied)
    config = type(config)(config.text, config.vision, **{f"{n}_token_id": ids[f"<|{t}|>"] for n, t in names.items()})
    (tmp_path / "reference").mkdir()
    params, _ = load_folder(build(config, tmp_path / "reference").folder)
    settings = ImageSettings(patch_size=4, min_pixels=64, max_pixels=1024)
    folder = export_folder(params, config, tmp_path / "tokenizer", settings, tmp_path / "export")
    script("write_reference").write_reference(folder, tmp_path / "reference.npz")
    check = script("check_export").check
    assert check(str(folder), str(tmp_path / "reference.npz")) == []
    with np.load(tmp_path / "reference.npz") as saved:
        changed = dict(saved) | {"logits": saved["logits"] + 1e-3}
    assert changed["logits"].std() >= 1
    np.savez(tmp_path / "changed.npz", **changed)
    assert "logits differ by" in check(str(folder), str(tmp_path / "changed.npz"))[0]


def test_windows_of_the_tower_are_felt(windowed, talk):
    params, config = load_folder(windowed.folder)
    conversation = talk(config)["two uneven pictures"]
    arrays, length = row(config, conversation), len(conversation.tokens)
    unseeing = dataclasses.replace(config, vision=dataclasses.replace(config.vision, window=0, full_layers=()))
    assert np.abs(ours(unseeing, params, arrays, length) - ours(config, params, arrays, length)).max() >= 100 * LOGITS
