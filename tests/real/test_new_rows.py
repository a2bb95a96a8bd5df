"""A published model with more rows: what it makes of ids that it had before stays as it was, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ain_jax import sample
from ain_jax.kits import models
from ain_jax.models.multimodal import MultimodalModel
from ain_jax.tokenizer.extend import count_chunks, grow, learn, open_base
from ain_jax.weights import rows_report
from ain_jax.weights.embeddings import Embeddings, extend_params, extend_rows
from ain_jax.weights.load import load_folder
from ain_jax.weights.states import text_states

pytestmark = pytest.mark.real

NAME = "SmolLM2-135M-Instruct"
ARABIC = [row["ar"] for row in sample.rows("udhr") if row.get("ar")]
ENGLISH = [row["en"] for row in sample.rows("udhr")[1:29] if row.get("en")]


@pytest.fixture(scope="module")
def grown():
    folder = models.found(NAME, models.default_folder())
    if folder is None:
        pytest.skip(f"{NAME} is not in {models.default_folder()}; run `python -m ain_jax.kits.models {NAME}`")
    base = open_base(folder)
    learnt = learn(base, count_chunks(ARABIC, progress=False), 500)
    params, config = load_folder(folder, jnp.float32)
    return base, learnt, grow(base, learnt), params, config


def test_old_ids_keep_their_logits(grown):
    base, learnt, new, params, config = grown
    wide, larger = extend_params(params, config, base.size, learnt.replaces, Embeddings())
    tokens_NL = np.array([base.backend.encode(ENGLISH[0], add_special_tokens=False).ids[:48]])
    assert new.encode(ENGLISH[0], add_special_tokens=False).ids[:48] == tokens_NL[0].tolist()
    # A product of another shape may be summed in another order: the old table gets as many rows, of zeros.
    table = np.asarray(params["model"]["embed_tokens"]["weight"])
    padded = np.zeros((larger.text.vocabulary, table.shape[1]), np.float32)
    padded[: len(table)] = table
    model = params["model"]
    before = {**params, "model": {**model, "embed_tokens": {"weight": padded}}}
    score = jax.jit(lambda p, hidden: MultimodalModel(larger).apply({"params": p}, hidden, method="logits"))
    states = [text_states(larger, p, tokens_NL, np.array([48]))[0] for p in (before, wide)]
    assert states[0].tobytes() == states[1].tobytes()
    logits = [np.asarray(score(p, h))[:, : base.size] for p, h in zip((before, wide), states, strict=True)]
    assert logits[0].tobytes() == logits[1].tobytes()
    assert extend_rows(table, np.zeros((1, table.shape[1])), base.size, base.size + 1)[: base.size].tobytes() == (
        table.tobytes()
    )


def test_english_hardly_notices_shrunk_rows(grown):
    base, learnt, new, params, config = grown
    texts = rows_report.cut_alike(base.backend, new, {"en": ENGLISH}, base.ids["<|im_start|>"], 96, 16)
    before = rows_report.losses(params, config, texts, extended=False)["en"]
    wide, larger = extend_params(params, config, base.size, learnt.replaces, Embeddings(shrink=0.7))
    after = rows_report.losses(wide, larger, texts, extended=True)["en"]
    assert 0 < rows_report.rise(before, after) < 0.001
