"""Adapters against PEFT's, over the same tiny model of transformers: text, a picture and both."""

import json
import warnings
from functools import lru_cache
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ain_jax.generate import Prompt, rows_of
from ain_jax.models import lora
from ain_jax.models.config import ClipConfig, ModelConfig, TextConfig, tiny, to_hf
from ain_jax.models.lora import Lora
from ain_jax.models.multimodal import MultimodalModel, init_params
from ain_jax.weights.adapters import load_adapters, save_adapters
from ain_jax.weights.export import write_json
from ain_jax.weights.load import load_folder

LOGITS = 1e-4
LLAMA = TextConfig(192, 32, 96, 2, 4, 2, 8, rope_theta=1e4, norm_eps=1e-5, qkv_bias=False, max_positions=512)
CONFIGS = {
    "tied": tiny(tied=True),
    "untied": tiny(tied=False, norm_eps=1e-5),
    "text alone": ModelConfig(LLAMA, family="llama", eos_token_id=186),
    "tiles": ModelConfig(
        LLAMA,
        ClipConfig(width=24, layers=3, heads=2, mlp_width=48, tile=16, patch_size=4, pinpoints=((16, 32), (32, 16))),
        "llava_next",
        "llama",
        image_token_id=190,
    ),
}
TOKENS = [1, 2, 3, 188, 189, 189, 189, 189, 187, 9, 4, 11]
GRID = (1, 4, 4)


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """`base("tied")`: a folder of random weights, so large that the logits have a standard deviation of 1 or more."""
    torch = pytest.importorskip("torch")
    import transformers

    @lru_cache
    def make(name) -> Path:
        folder = tmp_path_factory.mktemp(name)
        write_json(folder / "config.json", to_hf(CONFIGS[name]))
        config = transformers.AutoConfig.from_pretrained(folder)
        model = getattr(transformers, config.architectures[0])(config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for key, weight in sorted(model.named_parameters()):
                values = torch.randn(weight.shape, generator=generator)
                if weight.ndim == 1:
                    weight.copy_(0.3 * values if key.endswith("bias") else 1 + 0.2 * values)
                else:
                    weight.copy_(
                        values * (0.3 if "embed_tokens" in key or "lm_head" in key else weight[0].numel() ** -0.5)
                    )
        model.save_pretrained(folder)
        return folder

    return make


def opened(folder):
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0])
    return model.from_pretrained(folder, attn_implementation="eager").eval()


def with_peft(folder, adapters):
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT only warns of missing tensors and of keys it does not know
        return peft.PeftModel.from_pretrained(opened(folder), adapters).eval()


def made_with_peft(folder, out, **settings):
    """The model with adapters of random values, none of them 0, saved by PEFT to `out`."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    model = peft.get_peft_model(opened(folder), peft.LoraConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if ".lora_" in key:
                values = torch.randn(weight.shape, generator=generator)
                weight.copy_(weight * (1 + 0.3 * values) if "magnitude" in key else 0.2 * values)
    model.save_pretrained(out)
    return model


PATCHES = np.random.default_rng(5).normal(size=(16, CONFIGS["tied"].vision.patch_values)).astype(np.float32)


def theirs(model, grad=False):
    """logits_LV of the conversation, with its picture in a Qwen2-VL."""
    import torch

    inputs = {"input_ids": torch.tensor([TOKENS])}
    if model.config.model_type == "qwen2_vl":
        inputs |= {"pixel_values": torch.tensor(PATCHES), "image_grid_thw": torch.tensor([GRID])}
        inputs |= {"mm_token_type_ids": (inputs["input_ids"] == 189).int()}
    with torch.set_grad_enabled(grad):
        logits_LV = model(**inputs).logits[0]
    return logits_LV if grad else logits_LV.numpy()


def ours(config, variables):
    sees = config.family == "qwen2_vl" and config.vision
    arrays = rows_of([Prompt(TOKENS, PATCHES, (GRID,)) if sees else Prompt(TOKENS)], config, 1, 16, 16 if sees else 0)
    arrays = {name: array for name, array in arrays.items() if name not in ("length_B", "next_position_B")}
    return compiled(config)(variables, arrays)[0, : len(TOKENS)]


@lru_cache
def compiled(config):
    model = MultimodalModel(config)
    return jax.jit(lambda v, arrays: model.apply(v, model.apply(v, **arrays), method="logits"))


def equal(found, expected):
    np.testing.assert_allclose(found, expected, atol=LOGITS, rtol=0)


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b))


def random_adapters(settings, config, seed=0, dtype=np.float32, params=None):
    """Pairs of random values, none of them 0, and magnitudes that are near the columns' own lengths."""
    rng = np.random.default_rng(seed)

    def one(path, x):
        values = rng.normal(size=x.shape)
        is_length = jax.tree_util.keystr(path).endswith("['magnitude']")
        return (np.asarray(x) * (1 + 0.3 * values) if is_length else 0.2 * values).astype(dtype)

    return jax.tree_util.tree_map_with_path(one, lora.init(settings, config, jax.random.key(0), params))


# Each has a setting that the others lack.
CASES = {
    "decoder": ("tied", {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}),
    "all-linear": ("untied", {"r": 4, "lora_alpha": 2, "target_modules": "all-linear", "use_rslora": True}),
    "embedding and head": ("untied", {"r": 2, "lora_alpha": 5, "target_modules": ["embed_tokens", "lm_head", "fc1"]}),
    "text alone": ("text alone", {"r": 3, "lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "patterns": (
        "tied",
        {
            "r": 2,
            "target_modules": r"(?!model\.visual\.merger).*(mlp|attn)\.(down_proj|o_proj|qkv|fc2|2)",
            "exclude_modules": r"model\.visual.*qkv",
            "rank_pattern": {"down_proj": 5},
            "alpha_pattern": {r"self_attn\.o_proj": 3},
        },
    ),
    "dora": (
        "untied",
        {
            "r": 3,
            "lora_alpha": 5,
            "use_dora": True,
            "target_modules": ["q_proj", "o_proj", "down_proj", "fc1", "qkv", "2", "embed_tokens", "lm_head"],
            "rank_pattern": {"o_proj": 2},
        },
    ),
    "dora in tiles": ("tiles", {"r": 2, "target_modules": "all-linear", "use_dora": True, "use_rslora": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_adapters_of_peft_give_its_logits(tmp_path, base, case):
    name, settings = CASES[case]
    model = made_with_peft(base(name), tmp_path / "theirs", **settings)
    params, config = load_folder(base(name))
    adapters, read = load_adapters(tmp_path / "theirs", config, params)
    unmerged, plain = theirs(model), theirs(opened(base(name)))
    assert plain.std() >= 1 and unmerged.std() >= 1 and np.abs(unmerged - plain).max() >= 100 * LOGITS
    found = ours(config, {"params": lora.merge(params, adapters, read)})
    equal(found, unmerged)
    equal(found, theirs(model.merge_and_unload()))
    equal(ours(config, {"params": params, "lora": lora.scaled(adapters, read)}), unmerged)


def test_the_gradients_of_dora_are_those_of_peft(tmp_path, base):
    """No gradient goes through the length of a column, which would turn those of a and b."""
    torch = pytest.importorskip("torch")
    name, settings = CASES["dora"]
    model = made_with_peft(base(name), tmp_path / "theirs", **settings)
    params, config = load_folder(base(name))
    adapters, read = load_adapters(tmp_path / "theirs", config, params)
    weights_LV = np.random.default_rng(7).normal(size=(len(TOKENS), config.text.vocabulary)).astype(np.float32)

    (theirs(model, grad=True) * torch.tensor(weights_LV)).sum().backward()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if ".lora_" in key:
                weight.copy_(weight.grad)
    model.save_pretrained(tmp_path / "gradients")
    expected, _ = load_adapters(tmp_path / "gradients", config, params)

    def score(tree):
        return (ours(config, {"params": params, "lora": lora.scaled(tree, read)}) * weights_LV).sum()

    found = jax.jit(jax.grad(score))(adapters)
    size = lambda tree: {path: float(np.abs(leaf).max()) for path, leaf in jax.tree.leaves_with_path(tree)}
    apart = size(jax.tree.map(lambda x, y: x - y, found, expected))
    assert all(apart[path] < 1e-4 * largest for path, largest in size(expected).items()), apart


@pytest.mark.parametrize(("name", "dora"), [*((name, False) for name in CONFIGS), ("untied", True)])
def test_peft_opens_ours_to_the_same_logits(tmp_path, base, name, dora):
    params, config = load_folder(base(name))
    targets = ("all-linear", "embed_tokens") + (() if config.text.tied else ("lm_head",))
    ranks = {"q_proj": 5, "embed_tokens": 2}
    settings = Lora(3, 4.0, targets, rank_pattern=ranks, alpha_pattern={"o_proj": 2.5}, dora=dora)
    adapters = random_adapters(settings, config, params=params)
    save_adapters(adapters, settings, config, tmp_path / "ours", base=str(base(name)))
    model = with_peft(base(name), tmp_path / "ours")
    found = ours(config, {"params": lora.merge(params, adapters, settings)})
    assert np.abs(found - ours(config, {"params": params})).max() >= 100 * LOGITS
    equal(theirs(model), found)
    assert model.peft_config["default"].base_model_name_or_path == str(base(name))


@pytest.mark.parametrize("name", CONFIGS)
def test_all_linear_is_the_same_to_peft(tmp_path, base, name):
    config = CONFIGS[name]
    made_with_peft(base(name), tmp_path / "theirs", target_modules="all-linear", r=1)
    adapters, settings = load_adapters(tmp_path / "theirs", config)
    assert {path for path, *_ in lora.pairs(adapters)} == lora.targeted(Lora(rank=1), config).keys()
    assert lora.targeted(settings, config) == lora.targeted(Lora(rank=1), config)
    edited(tmp_path / "theirs", {"target_modules": "all-linear"})  # PEFT writes the names out; others may not
    assert same(load_adapters(tmp_path / "theirs", config)[0], adapters)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("tied", "dora"), [(True, False), (False, False), (False, True)])
def test_saved_and_loaded_the_bits_are_the_same(tmp_path, tied, dora, dtype):
    config = tiny(tied=tied, layers=3, windows=(4, 0))
    targets = ("model/embed_tokens", "o_proj", "down_proj", "attn/proj", "mlp/2")
    settings = Lora(4, 2.5, targets, True, {"mlp/down_proj": 2}, {"o_proj": 3.0}, dora)
    adapters = random_adapters(settings, config, dtype=dtype, params=init_params(config, jax.random.key(0)))
    folder = save_adapters(adapters, settings, config, tmp_path / "a")
    loaded, read = load_adapters(folder, config)
    assert same(loaded, adapters)
    again = save_adapters(loaded, read, config, tmp_path / "b")
    files = ["adapter_base.json", "adapter_config.json", "adapter_model.safetensors"]
    for name in files:
        assert (folder / name).read_bytes() == (again / name).read_bytes()
    assert sorted(p.name for p in folder.iterdir()) == files
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    assert read == Lora(4, 2.5, ("embed_tokens", *targets[1:]), True, {"down_proj": 2}, {"o_proj": 3.0}, dora)


def test_the_names_are_those_of_peft_today_and_older_ones_are_read(tmp_path):
    config, settings = tiny(), Lora(2, targets=("q_proj", "qkv", "embed_tokens"))
    adapters = random_adapters(settings, config)
    folder = save_adapters(adapters, settings, config, tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    assert shapes["base_model.model.model.language_model.layers.1.self_attn.q_proj.lora_A.weight"] == (2, 32)
    assert shapes["base_model.model.model.language_model.layers.1.self_attn.q_proj.lora_B.weight"] == (32, 2)
    assert shapes["base_model.model.model.visual.blocks.0.attn.qkv.lora_B.weight"] == (72, 2)
    assert shapes["base_model.model.model.language_model.embed_tokens.lora_embedding_A"] == (2, 192)
    assert shapes["base_model.model.model.language_model.embed_tokens.lora_embedding_B"] == (32, 2)
    assert shapes["base_model.model.lm_head.lora_A.weight"] == (2, 32)  # tied: the embedding's, turned
    older = lambda name: name.replace("model.language_model.", "model.").replace("model.model.visual.", "model.visual.")
    save_file({older(name): tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    loaded, read = load_adapters(folder, config)
    assert same(loaded, adapters) and set(read.targets) == set(settings.targets)


def edited(folder, attributes=None, tensors=None):
    """The folder with some attributes set and its tensors changed by a function."""
    path = folder / "adapter_config.json"
    write_json(path, json.loads(path.read_text()) | (attributes or {}))
    path = folder / "adapter_model.safetensors"
    held = load_file(path)
    save_file(tensors(held) if tensors else held, path)
    return folder


@pytest.fixture
def saved(tmp_path):
    config, settings = tiny(), Lora(2, targets=("q_proj", "up_proj"))
    return save_adapters(random_adapters(settings, config), settings, config, tmp_path / "saved", tokenizer="abc")


PREFIX = "base_model.model.model.language_model.layers"


def test_all_faults_are_told_at_once(saved):
    def spoil(tensors):
        tensors[f"{PREFIX}.0.self_attn.q_prj.lora_A.weight"] = tensors.pop(f"{PREFIX}.0.self_attn.q_proj.lora_A.weight")
        del tensors[f"{PREFIX}.1.self_attn.q_proj.lora_A.weight"], tensors[f"{PREFIX}.1.self_attn.q_proj.lora_B.weight"]
        tensors[f"{PREFIX}.0.mlp.up_proj.lora_A.weight"] = np.zeros((3, 32), np.float32)
        tensors[f"{PREFIX}.0.mlp.up_proj.lora_magnitude_vector"] = np.zeros(96, np.float32)
        tensors["base_model.model.lm_head.weight"] = np.zeros((192, 32), np.float32)
        tensors[f"{PREFIX}.0.mlp.down_proj.lora_A.weight"] = np.zeros((2, 96), np.float32)
        older = f"{PREFIX}.1.mlp.up_proj.lora_B.weight"
        tensors[older.replace("language_model.", "")] = tensors[older]
        return tensors

    attributes = {"lora_bias": True, "modules_to_save": ["lm_head"], "bias": "all", "new_in_peft": 3, "newer": None}
    with pytest.raises(ValueError) as error:
        load_adapters(edited(saved, attributes, spoil), tiny())
    for words in (
        "adapter_config.json: lora_bias=True is not handled; merge the adapter with PEFT and load the whole model",
        "adapter_config.json: modules_to_save=['lm_head'] is not handled",
        "adapter_config.json: new_in_peft=3 is not handled",
        "adapter_config.json: bias='all', expected 'none'",
        f"{PREFIX}.0.self_attn.q_prj.lora_A.weight (2, 32) has no place",
        f"{PREFIX}.0.self_attn.q_proj.lora_A.weight is missing, expected (2, 32)",
        f"{PREFIX}.1.self_attn.q_proj.lora_B.weight is missing, expected (32, 2)",
        f"{PREFIX}.0.mlp.up_proj.lora_A.weight has shape (3, 32), expected (2, 32) at rank 2",
        f"{PREFIX}.0.mlp.up_proj.lora_magnitude_vector (96,) has no place",
        "base_model.model.lm_head.weight (192, 32) has no place",
        f"{PREFIX}.0.mlp.down_proj.lora_B.weight is missing, expected (32, 2)",
        "leaves out model.language_model.layers.0.mlp.down_proj, which adapter_model.safetensors holds",
        "model.layers.1.mlp.up_proj is given twice",
    ):
        assert words in str(error.value), words
    assert "newer" not in str(error.value) and str(error.value).count("\n") == 16


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type='LOHA', expected 'LORA'"),
        ({"use_rslora": "yes"}, "use_rslora='yes'; expected bool"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', expected True or False or 'gaussian'"),
        ({"layers_to_transform": 0}, "layers_to_transform=0 is not handled"),
        ({"r": "2"}, "r='2'; expected int"),
        ({"rank_pattern": {"q_proj": 0}}, "q_proj=0; expected a number above 0"),
        ({"rank_pattern": {"layers.1.self_attn.q_proj": 3}}, r"layers.1.self_attn.q_proj has rank 3, expected 2 as in"),
        ({"alpha_pattern": {"0.mlp.up_proj": 3}}, r"layers.1.mlp.up_proj has alpha 16, expected 3 as in other layers"),
        ({"target_modules": ["q_proj", "up_proj", "v_proj"]}, r"0.self_attn.v_proj.lora_A.weight is missing"),
        ({"target_modules": None}, "target_modules=None; expected list or str"),
        ({"use_dora": True}, r"1.mlp.up_proj.lora_magnitude_vector is missing, expected \(96,\)"),
    ],
)
def test_what_peft_would_do_otherwise_is_refused(saved, attributes, message):
    with pytest.raises(ValueError, match=message):
        load_adapters(edited(saved, attributes), tiny())


def test_a_base_of_another_vocabulary_is_refused(saved, tmp_path):
    load_adapters(saved, tiny(), tokenizer="abc")
    with pytest.raises(ValueError, match="adapter_base.json: vocabulary_rows=192, expected 200"):
        load_adapters(saved, tiny(vocabulary=200))
    with pytest.raises(ValueError, match="adapter_base.json: tokenizer='abc', expected 'abd'"):
        load_adapters(saved, tiny(), tokenizer="abd")
    # Elsewhere nothing is recorded: the embedding's own shape tells.
    config, settings = tiny(), Lora(2, targets=("embed_tokens",))
    folder = save_adapters(random_adapters(settings, config), settings, config, tmp_path / "embedding")
    (folder / "adapter_base.json").unlink()
    with pytest.raises(ValueError, match=r"lora_embedding_A has shape \(2, 192\), expected \(2, 200\) at rank 2"):
        load_adapters(folder, tiny(vocabulary=200))


def test_an_adapted_embedding_of_a_tied_model_must_be_the_heads_too(tmp_path):
    config, settings = tiny(tied=True), Lora(2, targets=("embed_tokens",))
    folder = save_adapters(random_adapters(settings, config), settings, config, tmp_path / "a")
    headless = lambda tensors: {name: tensor for name, tensor in tensors.items() if "lm_head" not in name}
    load_adapters(edited(folder, tensors=headless), config)  # ensure_weight_tying says as much
    with pytest.raises(ValueError, match="ensure_weight_tying=False, expected True: the embedding is adapted"):
        load_adapters(edited(folder, {"ensure_weight_tying": False}), config)
    with pytest.raises(ValueError, match=r"lm_head has rank and alpha \[2, 3\], expected \[2, 16\]"):
        load_adapters(edited(folder, {"ensure_weight_tying": True, "alpha_pattern": {"lm_head": 3}}), config)
    save_adapters(random_adapters(settings, config), settings, config, folder)
    other = lambda tensors: {name: tensor + ("lm_head.lora_B" in name) for name, tensor in tensors.items()}
    with pytest.raises(ValueError, match=r"lm_head.lora_B.weight is not .*lora_embedding_A turned"):
        load_adapters(edited(folder, tensors=other), config)
    alone = lambda tensors: {name: tensor for name, tensor in tensors.items() if "lm_head" in name}
    with pytest.raises(
        ValueError, match="lm_head is adapted, expected embed_tokens, to which this model's head is tied"
    ):
        load_adapters(edited(folder, {"target_modules": ["lm_head"]}, alone), config)


def test_magnitudes_of_a_tied_embedding_are_refused(tmp_path, base):
    """The embedding's columns run over the vocabulary, the head's over the width: PEFT has magnitudes for each."""
    config, settings = tiny(tied=True), Lora(2, targets=("q_proj", "embed_tokens"), dora=True)
    with pytest.raises(ValueError, match="dora adapts model/embed_tokens, to which this model's head is tied"):
        lora.targeted(settings, config)
    pairs = random_adapters(Lora(2, targets=("q_proj", "embed_tokens")), config)
    pairs["model"]["embed_tokens"]["magnitude"] = np.ones(32, np.float32)
    with pytest.raises(
        ValueError, match=r"2 faults(.|\n)*embed_tokens: the head is (.|\n)*q_proj: magnitudes \[\], exp"
    ):
        save_adapters(pairs, settings, config, tmp_path / "ours")
    made_with_peft(base("tied"), tmp_path / "theirs", target_modules=["embed_tokens"], r=1, use_dora=True)
    with pytest.raises(ValueError, match="use_dora=True adapts embed_tokens, to which this model's head is tied"):
        load_adapters(tmp_path / "theirs", config)


def test_a_copy_of_the_base_must_be_the_base(tmp_path, base):
    made_with_peft(base("untied"), tmp_path / "theirs", target_modules=["embed_tokens", "lm_head"], r=1)
    params, config = load_folder(base("untied"))
    load_adapters(tmp_path / "theirs", config, params)
    with pytest.raises(ValueError, match=r"lm_head.base_layer.weight is a copy of the base's weight; expected params"):
        load_adapters(tmp_path / "theirs", config)
    params["lm_head"]["weight"] = params["lm_head"]["weight"] + 1
    with pytest.raises(ValueError, match=r"1 faults.*\n.*lm_head.base_layer.weight differs from lm_head/weight"):
        load_adapters(tmp_path / "theirs", config, params)


def test_what_is_no_folder_of_adapters_is_named(saved):
    weights = saved / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:300])
    with pytest.raises(ValueError, match="adapter_model.safetensors is truncated or damaged"):
        load_adapters(saved, tiny())
    weights.rename(saved / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is missing.* found .*, adapter_model.bin"):
        load_adapters(saved, tiny())
    (saved / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="adapter_config.json is missing; expected a folder as PEFT saves it"):
        load_adapters(saved, tiny())


def test_a_failed_save_leaves_the_old_folder_and_nothing_else(saved):
    config, settings = tiny(), Lora(2, targets=("q_proj", "v_proj"))
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    adapters = random_adapters(settings, config)
    attention = adapters["model"]["layers"]["self_attn"]
    attention["q_prj"] = attention.pop("q_proj")
    attention["v_proj"]["a"] = attention["v_proj"]["a"][:, :, :1]
    with pytest.raises(ValueError) as error:
        save_adapters(adapters, settings, config, saved)
    assert "model/layers/self_attn/q_prj is no matrix of this model" in str(error.value)
    assert "v_proj: a (2, 32, 1) and b (2, 2, 2, 8), expected (2, 32, 2) and (2, 2, 2, 8)" in str(error.value)
    with pytest.raises(ValueError, match="there is no pair to save"):
        save_adapters({}, settings, config, saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]
