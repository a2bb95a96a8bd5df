"""Conversations about tiled pictures in packed rows: laid as decoding lays them, and the same packed as alone."""

import dataclasses
import io

import families
import jax
import numpy as np
import pytest
from PIL import Image

from ain_jax import generate
from ain_jax.data import loader, pack_plan
from ain_jax.data.examples import tokenise
from ain_jax.data.formats import Message, Record
from ain_jax.data.mixture import Mixture
from ain_jax.data.packing import Packing
from ain_jax.models.multimodal import init_params
from ain_jax.tokenizer.extend import padded_vocab

# Width and height of the pictures of each conversation. Of the flat one no row is left, and so no end of a line.
SIZES = [[(16, 16)], [(40, 12), (9, 30)], [(25, 31)], [(160, 2), (40, 12)], []]


def png(width, height, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def model(tokenizer):
    config = families.llava("llama")
    text = dataclasses.replace(config.text, vocabulary=padded_vocab(len(tokenizer), 64))
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    config = dataclasses.replace(config, text=text, image_token_id=pad)
    params = jax.tree.map(lambda x: 1.5 * x + 0.05, init_params(config, jax.random.key(0)))
    return config, params


@pytest.fixture(scope="module")
def examples(model, tokenizer, tmp_path_factory):
    records = []
    for number, sizes in enumerate(SIZES):
        ask = Message("user", "<image>" * len(sizes) + f"ما هذا {number}؟")
        pictures = tuple(png(*size, seed=10 * number + n) for n, size in enumerate(sizes))
        records.append(
            Record(
                str(number), "talks", "ar", "talk", messages=(ask, Message("assistant", "هذه الكلمة")), images=pictures
            )
        )
    settings = families.picture_settings(model[0])
    return tokenise(records, "talks", tokenizer, settings, 256, "mark", tmp_path_factory.mktemp("tokenised"))


def rows(examples, model, packing, order, folder):
    """The batch whose rows hold these examples."""
    settings = families.picture_settings(model[0])
    plan = pack_plan.plan({"talks": examples}, None, packing, None, 0, folder / "plan.npz")
    units = np.array([(0, e) for row in order for e in row], np.int32)
    starts = np.cumsum([0, *map(len, order)])
    plan = dataclasses.replace(plan, units_U2=units, starts_R=starts)
    data = loader.Rows(plan, [examples], packing, model[0].image_token_id, settings)
    ((batch, _),) = loader.batches(data, len(order), None)
    return batch


def test_a_row_is_laid_as_decoding_lays_a_prompt(examples, model, tmp_path):
    config, _ = model
    settings = families.picture_settings(config)
    for number in range(4):
        batch = rows(examples, model, Packing(row_tokens=256, row_patches=160), [[number]], tmp_path)
        tokens_L = examples.tokens_T[examples.starts_S[number] : examples.starts_S[number + 1]]
        prompt = generate.prompt_with_images(tokens_L, examples.records[number].images, settings)
        assert len(prompt.patches_PK) == examples.sizes()[number][1]
        laid = generate.rows_of([prompt], config, 1, 256, 160)
        for name in ("tokens_BL", "feature_index_BL", "patches_BPK"):
            np.testing.assert_array_equal(getattr(batch, name), laid[name], err_msg=name)
        here = slice(0, len(tokens_L))
        np.testing.assert_array_equal(batch.positions_B3L[0, :, here], laid["positions_3BL"][:, 0, here])


def test_a_mixture_packs_them_within_the_budget_of_patches(examples, tmp_path):
    patches = examples.sizes()[:, 1]
    assert patches.min() == 0 and (patches % 16 == 0).all() and len(set(patches.tolist())) == 4
    packing = Packing(row_tokens=256, row_patches=int(patches.max()), window=4)
    plan = pack_plan.plan({"talks": examples}, Mixture({"talks": 1.0}), packing, 6, 0, tmp_path / "plan.npz")
    filled = [int(patches[plan.row(r)[:, 1]].sum()) for r in range(plan.rows)]
    assert max(filled) <= packing.row_patches and plan.max_units > 1
