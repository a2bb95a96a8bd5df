"""Our decoder against transformers' in every family of text models: the same weights, the same numbers, in float32.

Logits to 1e-4 with a standard deviation of 1 or more; switching any one setting off moves them by 100 tolerances.
"""

import dataclasses
from functools import lru_cache

import jax
import numpy as np
import pytest
from families import TEXTS

from ain_jax.generate import Prompt, generate
from ain_jax.models.config import ModelConfig, TextConfig
from ain_jax.models.multimodal import MultimodalModel
from ain_jax.weights.export import write_json, write_weights
from ain_jax.weights.load import load_folder

torch = pytest.importorskip("torch")
LOGITS = 1e-4
LENGTH = 40  # of the texts: more than any window, and than the positions of pretraining where these are scaled


@pytest.fixture(scope="module", params=TEXTS)
def case(request, build_once):
    return build_once(TEXTS[request.param])


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 96, (2, LENGTH)).astype(np.int32)


def theirs(reference, tokens_BL) -> np.ndarray:
    with torch.no_grad():
        return reference.model(torch.tensor(tokens_BL).long()).logits.numpy()


@lru_cache
def compiled(config: ModelConfig):
    model = MultimodalModel(config)

    def logits(params, tokens_BL, segments_BL, positions_3BL):
        hidden = model.apply({"params": params}, tokens_BL, segments_BL, positions_3BL)
        return model.apply({"params": params}, hidden, method="logits")

    return jax.jit(logits)


def ours(config: ModelConfig, params, tokens_BL) -> np.ndarray:
    positions_3BL = np.broadcast_to(np.arange(tokens_BL.shape[1], dtype=np.int32), (3, *tokens_BL.shape))
    return np.asarray(compiled(config)(params, tokens_BL, np.ones_like(tokens_BL), positions_3BL))


def test_logits_are_equal(case):
    params, config = load_folder(case.folder)
    assert config == case.config
    expected = theirs(case, tokens())
    assert expected.std() >= 1, "weights too small to test with"
    np.testing.assert_allclose(ours(config, params, tokens()), expected, atol=LOGITS, rtol=0)


def test_packed_texts_equal_texts_alone(case):
    params, config = load_folder(case.folder)
    if config.text.rope_scaling and config.text.rope_scaling.kind == "dynamic":
        pytest.skip("dynamic positions depend on the longest text of a batch")
    one, other = tokens()[:, :25], tokens()[:, 25:]
    row_BL = np.concatenate([one, other], axis=1)
    segments_BL = np.repeat([[1], [1]], LENGTH, axis=1).astype(np.int32)
    segments_BL[:, 25:] = 2
    positions_L = np.concatenate([np.arange(25), np.arange(LENGTH - 25)]).astype(np.int32)
    positions_3BL = np.broadcast_to(positions_L, (3, 2, LENGTH))
    found = np.asarray(compiled(config)(params, row_BL, segments_BL, positions_3BL))
    np.testing.assert_allclose(found[:, :25], theirs(case, one), atol=LOGITS, rtol=0)
    np.testing.assert_allclose(found[:, 25:], theirs(case, other), atol=LOGITS, rtol=0)


def test_greedy_decoding_of_uneven_prompts_is_equal_token_for_token(case):
    params, config = load_folder(case.folder)
    if config.text.rope_scaling and config.text.rope_scaling.kind == "dynamic":
        pytest.skip("transformers turns cached keys by the frequencies of the step that cached them")
    prompts = [tokens()[0, :length] for length in (30, 5, 17)]
    expected = []
    for prompt in prompts:
        ids = torch.tensor(prompt)[None].long()
        greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        new = case.model.generate(ids, attention_mask=torch.ones_like(ids), **greedy)
        expected.append(new[0, len(prompt) :].tolist())
    assert generate(params, config, [Prompt(prompt) for prompt in prompts], 12) == expected


def test_written_weights_are_the_same_bytes(case, tmp_path):
    params, config = load_folder(case.folder)
    write_weights(params, config, tmp_path)
    from safetensors.numpy import load_file

    before, after = (load_file(folder / "model.safetensors") for folder in (case.folder, tmp_path))
    assert before.keys() == after.keys()
    for name in before:
        assert np.array_equal(before[name], after[name]), name


OFF = {  # settings that a case has, and the same switched off
    "rope_scaling": None,
    "windows": (0,),
    "window_theta": None,
    "query_scale": None,
    "attention_softcap": None,
    "logit_softcap": None,
    "scale_embedding": False,
    "norm_plus_one": False,
    "activation": "silu",
    "mrope_section": None,
}


def test_each_setting_is_felt(case):
    params, config = load_folder(case.folder)
    before = ours(config, params, tokens())
    plain = {f.name: f.default for f in dataclasses.fields(TextConfig)}
    for name, off in OFF.items():
        if getattr(config.text, name) == plain[name]:
            continue
        changes = {name: off} | ({"window_theta": None} if name == "windows" else {})
        text = dataclasses.replace(config.text, **changes)
        changed = ours(dataclasses.replace(config, text=text), restacked(params, config.text, text), tokens())
        assert np.abs(changed - before).max() >= 100 * LOGITS, name


def restacked(params, before: TextConfig, after: TextConfig):
    """The parameters of a model whose layers stand in other stacks."""
    if [s[::2] for s in before.stacks()] == [s[::2] for s in after.stacks()]:
        return params
    model = dict(params["model"])
    stacks = [model.pop(name) for name, _, _ in before.stacks()]
    whole = jax.tree.map(lambda *leaves: np.concatenate(leaves), *stacks)
    first = 0
    for name, _, count in after.stacks():
        model[name] = jax.tree.map(lambda leaf, a=first, b=first + count: leaf[a:b], whole)
        first += count
    return params | {"model": model}


@pytest.mark.parametrize("change", [{"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, {"mlp_bais": True}])
def test_a_config_from_elsewhere_is_refused_by_name(build_once, tmp_path, change):
    import json

    reference = build_once(TEXTS["llama"])
    attributes = json.loads((reference.folder / "config.json").read_text()) | change
    attributes.pop("rope_parameters", None)
    write_json(tmp_path / "config.json", attributes)
    with pytest.raises(ValueError, match="longrope|mlp_bais"):
        load_folder(tmp_path)
