"""Real models: ain_jax gives each token the likelihood that transformers gives it, and goes on with the same words.

The folders are those of `ain_jax/kits/models.py`. A run uses them where they are. It downloads them (0.3 GB) only
if AIN_JAX_REAL=1 asks for it, and comes to the 1.5B model (1 GB to download, 18 GB of memory, ten minutes) only if
AIN_JAX_REAL_LARGE=1 does.
"""

import gc
import os
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ain_jax import sample
from ain_jax.generate import Prompt, generate, rows_of
from ain_jax.kits import models
from ain_jax.models.multimodal import MultimodalModel
from ain_jax.weights.load import load_folder

pytestmark = pytest.mark.real

LANGUAGES = ("ar", "en")
# Preamble and first articles of the Declaration, cut to more tokens than Gemma's window of 512 holds.
TEXTS = {lang: " ".join(row[lang] for row in sample.rows("udhr")[1:29] if row[lang]) for lang in LANGUAGES}
PROMPTS = {"ar": "عاصمة المملكة العربية السعودية هي", "en": "The sun rises in the east and"}
TOKENS = 640
NEW_TOKENS = 24
LAST = 64  # positions whose logits are compared one by one
# Above these perplexities of the text the weights were put together wrongly, whatever both sides agree on.
FLUENT = {
    "SmolLM2-135M-Instruct": {"en": 16.0},  # it never learnt Arabic; 140 with its query and key rows left in pairs
    "gemma-3-270m": {"ar": 33.0, "en": 7.0},
    "Qwen2.5-Coder-1.5B-Instruct": {"ar": 46.0, "en": 3.3},
}


@dataclass(frozen=True)
class Outcome:
    """What one side makes of the texts and prompts, by language."""

    losses_L: dict[str, np.ndarray]  # nats of each token after the first
    last_logits_LV: dict[str, np.ndarray]
    continuation: dict[str, list[int]]


@pytest.fixture(scope="module", params=models.MODELS)
def folder(request) -> Path:
    name = request.param
    if name not in models.SMALL and os.environ.get("AIN_JAX_REAL_LARGE") != "1":
        pytest.skip(f"{name} needs 18 GB of memory and ten minutes; AIN_JAX_REAL_LARGE=1 asks for it")
    place = models.found(name, models.default_folder())
    if place is None and os.environ.get("AIN_JAX_REAL") != "1":
        command = f"python -m ain_jax.kits.models {name}"
        pytest.skip(f"{name} is not in {models.default_folder()}; run `{command}` or set AIN_JAX_REAL=1")
    try:
        return models.make(name, models.default_folder())
    except models.Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def theirs(folder, tokenizer) -> Outcome:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    left = {what: names for what, names in loading.items() if names}
    assert not left, f"transformers finds the folder incomplete: {left}"
    model = model.eval().float()
    losses_L, last_logits_LV, continuation = {}, {}, {}
    with torch.inference_mode():
        for lang in LANGUAGES:
            ids_L = tokenizer(TEXTS[lang])["input_ids"][:TOKENS]
            logits_LV = model(torch.tensor([ids_L])).logits[0].numpy()
            losses_L[lang], last_logits_LV[lang] = losses(logits_LV, ids_L), logits_LV[-LAST:].copy()
            prompt_1L = torch.tensor([tokenizer(PROMPTS[lang])["input_ids"]])
            made = model.generate(
                prompt_1L,
                attention_mask=torch.ones_like(prompt_1L),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                output_logits=True,
                return_dict_in_generate=True,
            )
            new = made.sequences[0, prompt_1L.shape[1] :].tolist()
            continuation[lang] = [token for token in new if token != tokenizer.eos_token_id]
            two_T2 = torch.stack(made.logits)[:, 0].topk(2).values
            margin = float((two_T2[:, 0] - two_T2[:, 1]).min())
            assert margin > 1e-2, f"{lang}: two tokens are {margin:.1e} apart; choose a prompt where one is likeliest"
    del model
    gc.collect()  # the large model does not fit twice
    return Outcome(losses_L, last_logits_LV, continuation)


@pytest.fixture(scope="module")
def ours(folder, tokenizer) -> Outcome:
    params, config = load_folder(folder, np.float32)
    params = jax.tree.map(jnp.asarray, params)
    model = MultimodalModel(config)
    losses_L, last_logits_LV = {}, {}
    for lang in LANGUAGES:
        ids_L = tokenizer(TEXTS[lang])["input_ids"][:TOKENS]
        arrays = rows_of([Prompt(ids_L)], config, 1, len(ids_L), 0)
        for name in ("length_B", "next_position_B"):
            arrays.pop(name)
        hidden_BLD = jax.jit(lambda p, a: model.apply({"params": p}, **a))(params, arrays)
        logits_LV = np.asarray(model.apply({"params": params}, hidden_BLD, method="logits"))[0]
        losses_L[lang], last_logits_LV[lang] = losses(logits_LV, ids_L), logits_LV[-LAST:].copy()
    prompts = [Prompt(tokenizer(PROMPTS[lang])["input_ids"]) for lang in LANGUAGES]
    new = generate(params, config, prompts, NEW_TOKENS, [tokenizer.eos_token_id])
    return Outcome(losses_L, last_logits_LV, dict(zip(LANGUAGES, new, strict=True)))


def losses(logits_LV: np.ndarray, ids_L: list[int]) -> np.ndarray:
    """Nats of each token given those before it, from the second on."""
    found = []
    for logits_V, token in zip(logits_LV, ids_L[1:], strict=False):  # the last position has no successor
        logits_V = logits_V.astype(np.float64)
        highest = logits_V.max()
        found.append(highest + np.log(np.exp(logits_V - highest).sum()) - logits_V[token])
    return np.array(found)


@pytest.mark.parametrize("lang", LANGUAGES)
def test_the_tokenizer_gives_back_what_it_read(tokenizer, folder, lang):
    ids = tokenizer(TEXTS[lang])["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXTS[lang]
    assert max(len(tokenizer), max(ids) + 1) <= models.read_json(folder / "config.json")["vocab_size"]


@pytest.mark.parametrize("lang", LANGUAGES)
def test_the_weights_are_those_of_the_model(theirs, folder, lang):
    perplexity = np.exp(theirs.losses_L[lang].mean())
    assert perplexity < FLUENT[folder.name].get(lang, np.inf)


@pytest.mark.parametrize("lang", LANGUAGES)
def test_each_token_is_as_likely_as_in_transformers(ours, theirs, lang):
    np.testing.assert_allclose(ours.losses_L[lang].mean(), theirs.losses_L[lang].mean(), rtol=1e-5)
    np.testing.assert_allclose(ours.losses_L[lang], theirs.losses_L[lang], atol=5e-4, rtol=0)
    np.testing.assert_allclose(ours.last_logits_LV[lang], theirs.last_logits_LV[lang], atol=5e-4, rtol=0)


@pytest.mark.parametrize("lang", LANGUAGES)
def test_it_goes_on_with_the_same_words(ours, theirs, tokenizer, lang):
    assert ours.continuation[lang] == theirs.continuation[lang], (
        f"ours: {tokenizer.decode(ours.continuation[lang])!r}\ntheirs: {tokenizer.decode(theirs.continuation[lang])!r}"
    )
