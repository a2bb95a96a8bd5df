"""Rows of several conversations with pictures and videos learn as each alone does, in every family that sees."""

import functools

import families
import jax
import numpy as np
import pytest
import worked

from ain_jax import generate
from ain_jax.data import visuals
from ain_jax.data.batch import Batch, PairBatch
from ain_jax.data.examples import Examples
from ain_jax.data.formats import Message, Record
from ain_jax.data.packing import Packing, lay_row
from ain_jax.data.tiles import TileSettings
from ain_jax.models.multimodal import MultimodalModel
from ain_jax.train import losses
from ain_jax.train.preferences import Preference, preference

FAMILIES = {
    "qwen2_vl": families.QWENS["untied"],
    "qwen2_5_vl": families.QWENS["qwen 2.5"],
    "llava_next": families.LLAVAS["llama"],
}
# What stands in each conversation, in order: a picture as (width, height), a video as (frames, width, height).
MEDIA = [[(16, 8), (24, 16)], [(8, 16), (3, 16, 16)], [], [(4, 8, 16), (32, 16)]]
PACKING = Packing(row_tokens=192, row_patches=320, row_targets=64)
PREFERENCES = (
    Preference(beta=0.3, sft=0.5, label_smoothing=0.1),
    Preference("hinge", beta=0.3),
    Preference("ipo", beta=2.0),
    Preference("orpo"),
    Preference("simpo", beta=2.0, target_margin=1.0, sft=0.5),
    Preference("kto", undesirable_weight=0.5),
)
WORDS = 60  # ids below that are words in every family


def made(config, pairs):
    """The examples of one source, its tokens drawn, its pictures measured as records are."""
    settings = families.picture_settings(config)
    tiles = isinstance(settings, TileSettings)
    records, sequences, groups = [], [], []
    for number, asked in enumerate(MEDIA):
        media = [size for size in asked if len(size) == 2 or not tiles]
        rng = np.random.default_rng(number)
        content = "".join("<image>" if len(size) == 2 else "<video>" for size in media)
        seed = 100 * number
        record = Record(
            f"r{number}", "made", "ar", "talk", messages=(Message("user", content), Message("assistant", "x")),
            images=tuple(worked.png(seed + i, *size) for i, size in enumerate(media) if len(size) == 2),
            videos=tuple(
                tuple(worked.png(seed + 10 * i + f, *size[1:]) for f in range(size[0]))
                for i, size in enumerate(media) if len(size) == 3
            ),
        )  # fmt: skip
        own, counts = visuals.measured(record, settings)
        head = rng.integers(1, WORDS, 3).tolist()
        for size, count in zip(media, counts, strict=True):
            pad = config.image_token_id if len(size) == 2 else config.video_token_id
            head += [*[pad] * count, *rng.integers(1, WORDS, 2).tolist()]
        for answer in range(2 if pairs else 1):
            words = rng.integers(1, WORDS, 6 + 2 * answer).tolist()
            learn = np.arange(len(head) + len(words)) >= len(head)
            sequences.append((np.array(head + words, np.int32), learn, number, own))
        records.append(record)
        groups.append(number % 2)
    starts = lambda lengths: np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Examples(
        records=records,
        tokens_T=np.concatenate([tokens for tokens, *_ in sequences]),
        learn_T=np.concatenate([learn for _, learn, *_ in sequences]),
        starts_S=starts([len(tokens) for tokens, *_ in sequences]),
        record_S=np.array([number for _, _, number, _ in sequences], np.int32),
        first_E=starts([2 if pairs else 1] * len(records)),
        group_E=np.array(groups, np.int32),
        grids_M3=np.array([grid for *_, own in sequences for grid in own], np.int32).reshape(-1, 3),
        grid_starts_S=starts([len(own) for *_, own in sequences]),
        groups=("made/ar", "made/en"),
        fingerprint="made",
    )


@functools.cache
def family(name):
    config = FAMILIES[name]
    return config, families.random_params(config), families.picture_settings(config)


def segments(source, config, settings, example):
    rate = getattr(config.vision, "tokens_per_second", 0) or 0
    return source.segments(example, config.image_token_id, settings, config.video_token_id, rate)


def batch(source, config, settings, rows, packing=PACKING):
    merge = settings.merge_size
    laid = [
        lay_row([s for e in row for s in segments(source, config, settings, e)], packing, settings.patch_values, merge)
        for row in rows
    ]
    return Batch(**{name: np.stack([row[name] for row in laid]) for name in laid[0]})


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_conversations_and_pairs_learn_as_they_do_alone(name):
    config, params, settings = family(name)
    source = made(config, pairs=True)
    tokens, patches, _ = source.sizes()[:3].sum(axis=0).tolist()
    packing = Packing(row_tokens=-(-tokens // 16) * 16, row_patches=-(-patches // 16) * 16, row_targets=64)
    model = MultimodalModel(config)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def all_losses(params, pairs):
        """One gradient of all losses, compiled once: of every answer's tokens, of the pairs, of judged answers."""
        once = worked.Once(model)
        sums = [losses.next_token(once, 2)(params, {}, pairs.rows, None)]
        sums += [preference(once, 2, settings)(params, {}, pairs, None) for settings in PREFERENCES]
        return sum(s.loss / s.count for s in sums), sums

    def laid(rows):
        groups_BN = np.full((len(rows), 3), -1, np.int32)
        reference_BN2 = np.zeros((len(rows), 3, 2), np.float32)
        for b, row in enumerate(rows):
            groups_BN[b, : len(row)] = source.group_E[np.array(row, int)]
            reference_BN2[b, : len(row)] = np.reshape([(-20.0 - e, -25.0 + e) for e in row], (-1, 2))
        good_BN = np.array([[e != 1 for e in [*row, 1, 1, 1][:3]] for row in rows], np.int32)
        return PairBatch(batch(source, config, settings, rows, packing), groups_BN, reference_BN2, good_BN)

    (packed, packed_sums), packed_gradient = all_losses(params, laid([[1, 0, 2], [], []]))
    (alone, alone_sums), alone_gradient = all_losses(params, laid([[0], [1], [2]]))
    assert abs(float(packed) - float(alone)) < 1e-5
    for a, b in zip(packed_sums, alone_sums, strict=True):
        assert float(a.count) == float(b.count) > 0
        assert abs(float(a.loss) - float(b.loss)) / float(a.count) < 1e-5
        for part in a.parts:
            for one, other in zip(a.parts[part], b.parts[part], strict=True):
                np.testing.assert_allclose(one, other, atol=1e-4)
    for a, b in zip(jax.tree.leaves(packed_gradient), jax.tree.leaves(alone_gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=0)
    assert max(float(abs(np.asarray(g)).max()) for g in jax.tree.leaves(packed_gradient["visual"])) > 1e-3


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_a_video_is_laid_as_decoding_lays_it(name):
    config, _, settings = family(name)
    source = made(config, pairs=False)
    for number in (1, 3):
        laid = batch(source, config, settings, [[number]])
        (own,) = segments(source, config, settings, number)
        grids = [tuple(g) for g in source.grids_M3[source.grid_starts_S[number] : source.grid_starts_S[number + 1]]]
        assert sorted(frames for frames, _, _ in grids) == [1, 2]  # groups of two frames
        prompt = generate.Prompt(own.tokens_L, own.patches_PK, grids=grids)
        expected = generate.rows_of([prompt], config, 1, PACKING.row_tokens, PACKING.row_patches)
        for field in ("tokens_BL", "feature_index_BL", "patches_BPK", "patch_positions_BP2", "patch_segments_BP"):
            np.testing.assert_array_equal(getattr(laid, field), expected[field], err_msg=field)
        here = slice(0, len(own.tokens_L))
        np.testing.assert_array_equal(laid.positions_B3L[0, :, here], expected["positions_3BL"][:, 0, here])


def test_llava_next_refuses_a_video():
    settings = families.picture_settings(FAMILIES["llava_next"])
    frames = (worked.png(0), worked.png(1))
    record = Record("v", "made", "ar", "talk", messages=(Message("user", "<video>"),), videos=(frames,))
    with pytest.raises(ValueError, match="record v holds a video, and LLaVA-NeXT reads none: leave it out"):
        visuals.measured(record, settings)
