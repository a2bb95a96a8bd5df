"""Decoding against a forward pass over the whole row; transformers' generate is compared in tests/parity."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import ain_jax.generate
from ain_jax.generate import MOST_STOPS, Prompt, Speaker, _compiled, generate, main, rows_of
from ain_jax.models.config import tiny
from ain_jax.models.layers import apart
from ain_jax.models.multimodal import MultimodalModel, init_params

CONFIG = tiny(tied=False)
START, END, IMAGE = CONFIG.vision_start_token_id, CONFIG.vision_end_token_id, CONFIG.image_token_id
NEW = 12


@pytest.fixture(scope="module")
def params():
    # Large weights: each token then hangs on all the tokens before it.
    return jax.tree.map(lambda x: 3.0 * x, init_params(CONFIG, jax.random.key(3)))


def picture(grid, seed):
    return np.random.default_rng(seed).normal(size=(int(np.prod(grid)), CONFIG.vision.patch_values)).astype(np.float32)


PROMPTS = [
    Prompt([5, 6, 7, 8, 9, 10, 11]),
    Prompt([5, START, *[IMAGE] * 6, END, 7], picture((1, 4, 6), 0), ((1, 4, 6),)),
    Prompt([12]),
    Prompt(
        [START, *[IMAGE] * 2, END, START, *[IMAGE] * 4, END, 9, 10],
        np.concatenate([picture((1, 4, 2), 1), picture((1, 4, 4), 2)]),
        ((1, 4, 2), (1, 4, 4)),
    ),
    Prompt(list(range(20, 60))),
]


@pytest.fixture(scope="module")
def greedy(params):
    return generate(params, CONFIG, PROMPTS, NEW)


def test_each_new_token_is_the_likeliest_after_those_before_it(params, greedy):
    model = MultimodalModel(CONFIG)

    @jax.jit
    def logits_of(p, arrays):
        return model.apply({"params": p}, model.apply({"params": p}, **arrays), method="logits")

    for prompt, new in zip(PROMPTS, greedy, strict=True):
        whole = Prompt([*prompt.tokens_L, *new], prompt.patches_PK, prompt.grids)
        arrays = rows_of([whole], CONFIG, 1, 64, 64)
        logits_LV = np.asarray(
            logits_of(params, {k: v for k, v in arrays.items() if k not in ("length_B", "next_position_B")})
        )[0]
        start = len(prompt.tokens_L) - 1
        assert len(new) == NEW
        assert new == logits_LV[start : start + NEW].argmax(-1).tolist()


def test_the_answer_ends_before_the_stop_id(params, greedy):
    stop = greedy[0][3]
    stopped = generate(params, CONFIG, PROMPTS, NEW, [stop, 10**6])
    assert stopped[0] == greedy[0][: greedy[0].index(stop)]
    assert all(new == full[: len(new)] and stop not in new for new, full in zip(stopped, greedy, strict=True))


def compiled_decoding(config, new_tokens, whole=True):
    """(what reads prompts, the compiled loop of new tokens, what both are called with)."""
    begin, advance = _compiled(config, new_tokens, False, "float32")
    params = init_params(config, jax.random.key(0))
    if not whole:
        params["model"] |= {name: apart(params["model"][name]) for name, *_ in config.text.stacks()}
    arrays = rows_of([Prompt([5, 6, 7])], config, 2, 32, 0)
    drawing = {
        "place_B": np.zeros(2, np.int32),
        "stop_Z": jnp.full(MOST_STOPS, -1, jnp.int32),
        "temperature": jnp.float32(0.0),
        "key": jax.random.key(0),
    }
    texts, state = begin(params, arrays, drawing)
    return advance.lower(params, texts, drawing, state, new_tokens).compile(), (params, texts, drawing, state)


@pytest.mark.parametrize("windows", [(0,), (8, 0), (8, 8, 0)])
def test_a_step_copies_no_whole_stack_of_layers(windows):
    config = tiny(layers=8, windows=windows)
    loop, (params, _, _, state) = compiled_decoding(config, NEW)
    stacks = [x.size for x in jax.tree.leaves((params["model"]["layers"]["mlp"], state["cache"]["layers"]))]
    copied = re.findall(r"= \w+\[([\d,]*)\]\S* (?:copy|transpose)\(", loop.as_text())
    sizes = [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in copied]
    assert sizes and max(sizes) < min(stacks)


@pytest.mark.parametrize("windows", [(0,), (8, 8, 0)])
def test_on_a_cpu_a_step_reads_each_layer_where_it_lies(windows):
    config = tiny(layers=8, windows=windows)
    loops, sizes = [], set()
    for whole in (True, False):
        loop, (params, *_) = compiled_decoding(config, NEW, whole)
        sizes = {x[0].size for x in jax.tree.leaves(params["model"]["layers"]["mlp"])} if whole else sizes
        made = re.findall(r"= \w+\[([\d,]*)\]\S* (?!parameter|get-tuple-element|bitcast)[\w-]+\(", loop.as_text())
        loops.append(sizes & {int(np.prod([int(n) for n in shape.split(",") if n])) for shape in made})
    assert loops == [sizes, set()]


def test_layers_apart_lie_in_the_memory_of_their_stack():
    stack = {"even": jnp.arange(3 * 64.0).reshape(3, 8, 8), "odd": jnp.arange(9.0).reshape(3, 3)}
    layers = apart(stack)
    begin = stack["even"].unsafe_buffer_pointer()
    assert [layer["even"].unsafe_buffer_pointer() - begin for layer in layers] == [0, 256, 512]
    for i, layer in enumerate(layers):  # 12 bytes are no address that arrays may begin at: copied
        np.testing.assert_array_equal(layer["odd"], stack["odd"][i])


def test_prompts_of_uneven_length_fill_the_rows(params, monkeypatch):
    texts = [Prompt(list(range(5, 5 + length))) for length in (3, 70, 33, 9, 40)]
    alone = [generate(params, CONFIG, [text], NEW)[0] for text in texts]
    ran = []
    monkeypatch.setattr(
        ain_jax.generate,
        "rows_of",
        lambda chosen, config, B, L, P: ran.append((B, L)) or rows_of(chosen, config, B, L, P),
    )
    assert generate(params, CONFIG, texts, NEW) == alone
    assert generate(params, CONFIG, texts, NEW, rows=2) == alone
    assert ran == [(8, 128), (2, 32), (2, 64), (2, 128)]


def test_nothing_is_computed_behind_the_last_token():
    loop, (params, texts, drawing, state) = compiled_decoding(CONFIG, NEW)
    for until, steps in ((1, 0), (2, 1), (5, 4)):
        after = loop(params, texts, drawing, jax.tree.map(jnp.copy, state), until)
        assert int(after["step"]) == steps and np.asarray(after["count_B"]).tolist() == [until] * 2


def test_drawn_tokens_do_not_depend_on_the_neighbours(params):
    prompts = [Prompt([5 + i, 6]) for i in range(3)]
    together = generate(params, CONFIG, prompts, NEW, temperature=1.0, seed=5, rows=2)
    assert together == generate(params, CONFIG, prompts, NEW, temperature=1.0, seed=5, rows=1)
    assert together != generate(params, CONFIG, prompts, NEW, temperature=1.0, seed=6, rows=2)


def test_watching_changes_nothing_and_ends_one_row_alone(params, greedy):
    seen = {i: [] for i in range(len(PROMPTS))}

    def watch(prompt, ids):
        seen[prompt].append(ids)
        return prompt == 1 and len(ids) >= 5

    watched = generate(params, CONFIG, PROMPTS, NEW, watch=watch, every=5, rows=2)
    assert watched[1] == greedy[1][:5]
    assert [new for i, new in enumerate(watched) if i != 1] == [new for i, new in enumerate(greedy) if i != 1]
    assert [len(ids) for ids in seen[0]] == [5, 10, 12] and [len(ids) for ids in seen[1]] == [5]


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes alone: Arabic letters are two ids each."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=model)


@pytest.mark.parametrize("stop", [(), ("ك",), ("كي", "none"), ("absent",)])
@pytest.mark.parametrize("every", [1, 3, 7])
def test_a_speaker_tells_whole_letters_and_stops_at_a_string(tokenizer, stop, every):
    text = "سلام عليكم"
    ids = tokenizer(text)["input_ids"]
    told = []
    speaker = Speaker(tokenizer, stop, lambda prompt, new: told.append(new))
    for count in range(every, len(ids) + every, every):
        if speaker(0, ids[:count]):
            break
    expected = text.split(stop[0])[0] if stop else text
    assert speaker.finish(0, ids[:count]) == expected == "".join(told)
    assert not any("\ufffd" in new for new in told)


def test_an_empty_stop_string_is_refused(tokenizer):
    with pytest.raises(ValueError, match="a stop string is empty"):
        Speaker(tokenizer, [""])


def test_nothing_asked_nothing_said(params):
    assert generate(params, CONFIG, [], 3) == []
    assert generate(params, CONFIG, PROMPTS[:2], 0) == [[], []]


def test_faulty_prompts_are_refused_together(params):
    prompts = [Prompt([]), Prompt([1] * 511), Prompt([192]), Prompt([IMAGE], None, ((1, 2, 2),))]
    with pytest.raises(ValueError) as error:
        generate(params, CONFIG, prompts, 3)
    for words in (
        "prompt 0 has shape (0,)",
        "prompt 1 of 511 tokens",
        "512 positions",
        "prompt 2 holds ids",
        "prompt 3 has 0",
    ):
        assert words in str(error.value)
    with pytest.raises(ValueError, match=r"spans of \[3\] image tokens, but the 1 pictures take \[1\]"):
        generate(params, CONFIG, [Prompt([IMAGE] * 3, picture((1, 2, 2), 0), ((1, 2, 2),))], 3)


def test_the_command_names_what_is_missing(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--model", str(tmp_path), "hello"])
    assert stopped.value.code == 2 and "config.json is missing" in capsys.readouterr().err


def test_wrong_settings_of_decoding_are_told(params):
    for settings, words in (
        ({"temperature": -0.5}, "temperature=-0.5; expected 0"),
        ({"temperature": float("nan")}, "temperature=nan; expected 0"),
        ({"seed": 2**64}, f"seed={2**64}; expected 0 to"),
        ({"max_new_tokens": -3}, "max_new_tokens=-3; expected 0 or more"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            generate(params, CONFIG, PROMPTS[:1], **({"max_new_tokens": 2} | settings))


def test_features_of_any_number_of_patches():
    config = dataclasses.replace(CONFIG, vision=dataclasses.replace(CONFIG.vision, merge_size=3))
    prompt = Prompt([5, START, *[IMAGE] * 4, END, 7], picture((1, 6, 6), 0), ((1, 6, 6),))
    (new,) = generate(init_params(config, jax.random.key(0)), config, [prompt], 3)
    assert len(new) == 3
