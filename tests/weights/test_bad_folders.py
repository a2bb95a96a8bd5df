"""Folders that are not what they should be, of four families: refused with the file, the key, what was found and what
was expected. And exports that fail: nothing half-written stays behind, and an older export is whole.
"""

import json
import shutil
from pathlib import Path

import families
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ain_jax.models.config import to_hf
from ain_jax.weights import export
from ain_jax.weights.export import export_folder, write_json
from ain_jax.weights.load import load_folder

CASES = {
    "llama": families.TEXTS["llama"],
    "gemma3_text": families.TEXTS["gemma 3, a turn cut short"],
    "qwen2_vl": families.QWENS["untied"],
    "llava_next": families.LLAVAS["llama"],
}
PICTURED = ("qwen2_vl", "llava_next")
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 40_000


@pytest.fixture(scope="module")
def tokenizer_dir(small_tokenizer_folder) -> Path:
    return small_tokenizer_folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tokenizer_dir) -> dict[str, Path]:
    """A good folder of each family, in several shards."""
    place = tmp_path_factory.mktemp("whole")
    return {family: exported(family, place / family, tokenizer_dir) for family in CASES}


@pytest.fixture(params=CASES)
def family(request) -> str:
    return request.param


@pytest.fixture
def folder(family, whole, tmp_path) -> Path:
    """A copy to break."""
    return shutil.copytree(whole[family], tmp_path / "folder")


def exported(family: str, out: Path, tokenizer_dir: Path, params=None) -> Path:
    config = CASES[family]
    params = params or families.random_params(config)
    settings = families.picture_settings(config)
    return export_folder(params, config, tokenizer_dir, settings, out, shard_bytes=SHARD_BYTES)


def refusal(folder: Path, **how) -> str:
    with pytest.raises(ValueError) as error:
        load_folder(folder, **how)
    return str(error.value)


def second(folder: Path) -> Path:
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    return shards[1]


def header_length(data: bytes) -> int:
    return int.from_bytes(data[:8], "little")


def changed_tensors(path: Path, change) -> str:
    """Writes a file again, its tensors changed by `change(tensors, the first name)`; that name."""
    tensors = load_file(path)
    name = min(tensors)
    change(tensors, name)
    save_file(tensors, path)
    return name


def changed_json(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    write_json(path, value)


# Each breaks a folder and gives the words that the refusal must hold.


def cut_in_the_header(folder):
    data = second(folder).read_bytes()
    kept = data[: 8 + header_length(data) // 2]
    second(folder).write_bytes(kept)
    return [second(folder).name, "truncated or damaged", f"{len(kept)} bytes", str(8 + header_length(data))]


def cut_in_the_data(folder):
    data = second(folder).read_bytes()
    second(folder).write_bytes(data[:-100])
    return [second(folder).name, "truncated or damaged", f"{len(data) - 100} bytes", str(len(data))]


def too_long(folder):
    data = second(folder).read_bytes()
    second(folder).write_bytes(data + bytes(64))
    return [second(folder).name, "truncated or damaged", f"{len(data) + 64} bytes", str(len(data))]


def empty(folder):
    second(folder).write_bytes(b"")
    return [second(folder).name, "truncated or damaged", "download it again"]


def no_text_in_the_header(folder):
    data = second(folder).read_bytes()
    second(folder).write_bytes(data[:8] + b"\xff" * 12 + data[20:])
    return [second(folder).name, "truncated or damaged", "header", "download it again"]


def no_object_in_the_header(folder):
    data = second(folder).read_bytes()
    header = b"[]".ljust(header_length(data))
    second(folder).write_bytes(data[:8] + header + data[8 + len(header) :])
    return [second(folder).name, "truncated or damaged", "header", "download it again"]


def an_endless_header(folder):
    data = second(folder).read_bytes()
    second(folder).write_bytes((2**60).to_bytes(8, "little") + data[8:])
    return [second(folder).name, "truncated or damaged", "header", "download it again"]


def a_page_of_the_web(folder):
    """What a download that was refused leaves."""
    second(folder).write_bytes(b"<!DOCTYPE html>" + b" " * 4000)
    return [second(folder).name, "truncated or damaged", "download it again"]


def a_missing_shard(folder):
    name = second(folder).name
    second(folder).unlink()
    return [INDEX, name, "not found", "download"]


def a_missing_shard_without_an_index(folder):
    (folder / INDEX).unlink()
    tensors = load_file(second(folder))
    second(folder).unlink()
    return [f"{len(tensors)} faults", "is missing", str(next(iter(tensors.values())).shape)]


def no_weights(folder):
    for path in [folder / INDEX, *folder.glob("*.safetensors")]:
        path.unlink()
    return [str(folder), "no *.safetensors", "expected"]


def an_index_of_more_tensors(folder):
    changed_json(folder / INDEX, lambda index: index["weight_map"].update({"model.more": second(folder).name}))
    return [INDEX, "model.more", second(folder).name]


def an_index_of_another_order(folder):
    first, name = sorted(folder.glob("*.safetensors"))[0].name, min(load_file(second(folder)))
    changed_json(folder / INDEX, lambda index: index["weight_map"].update({name: first}))
    return [INDEX, name, first, second(folder).name]


def an_index_cut_short(folder):
    (folder / INDEX).write_bytes((folder / INDEX).read_bytes()[:100])
    return [INDEX, "no JSON"]


def an_index_without_places(folder):
    write_json(folder / INDEX, {"metadata": {"total_size": 1}})
    return [INDEX, "weight_map"]


def an_index_that_is_a_list(folder):
    (folder / INDEX).write_text("[1]")
    return [INDEX, "list", "expected"]


def places_that_are_a_list(folder):
    write_json(folder / INDEX, {"weight_map": ["model.norm.weight"]})
    return [INDEX, "weight_map"]


def another_shape(folder):
    shape = {}

    def change(tensors, name):
        shape[name] = tensors[name].shape
        tensors[name] = np.zeros((3, *tensors[name].shape), np.float32)

    name = changed_tensors(second(folder), change)
    return [f"{second(folder).name}: {name}", f"shape {(3, *shape[name])}", f"expected {shape[name]}"]


def an_extra_tensor(folder):
    changed_tensors(second(folder), lambda tensors, _: tensors.update({"model.more": np.zeros((3, 4), np.float32)}))
    return [f"{second(folder).name}: model.more (3, 4)", "no place in this model"]


def a_missing_tensor(folder):
    name = changed_tensors(second(folder), lambda tensors, name: tensors.pop(name))
    return [INDEX, name, second(folder).name]


def a_tensor_missing_in_the_index_too(folder):
    shape = {}
    name = changed_tensors(second(folder), lambda tensors, name: shape.update({name: tensors.pop(name).shape}))
    changed_json(folder / INDEX, lambda index: index["weight_map"].pop(name))
    return [name.removeprefix("language_model."), "is missing", f"expected {shape[name]}"]


def a_tensor_twice(folder):
    tensors = load_file(second(folder))
    name = min(tensors)
    last = sorted(folder.glob("*.safetensors"))[-1]
    changed_tensors(last, lambda others, _: others.update({name: tensors[name]}))
    return [name, second(folder).name, last.name]


def whole_numbers(folder):
    name = changed_tensors(second(folder), lambda t, name: t.update({name: t[name].astype(np.int8)}))
    return [f"{second(folder).name}: {name}", "dtype I8", "expected F32, F16, BF16", "quantised"]


def eight_bits(folder):
    name = changed_tensors(second(folder), lambda t, name: t.update({name: t[name].astype(ml_dtypes.float8_e4m3fn)}))
    return [f"{second(folder).name}: {name}", "dtype F8_E4M3", "expected F32, F16, BF16", "quantised"]


def layers_of_several_dtypes(folder):
    """One layer of a stack: as stored, the stack could not hold both."""
    name = changed_tensors(second(folder), lambda t, name: t.update({name: t[name].astype(ml_dtypes.bfloat16)}))
    return [f"{second(folder).name}: {name}", "BF16", "expected F32"]


FILES = [
    *(cut_in_the_header, cut_in_the_data, too_long, empty, no_text_in_the_header, no_object_in_the_header),
    *(an_endless_header, a_page_of_the_web, a_missing_shard, a_missing_shard_without_an_index, no_weights),
    *(an_index_of_more_tensors, an_index_of_another_order, an_index_cut_short, an_index_without_places),
    *(an_index_that_is_a_list, places_that_are_a_list, another_shape, an_extra_tensor, a_missing_tensor),
    *(a_tensor_missing_in_the_index_too, a_tensor_twice, whole_numbers, eight_bits, layers_of_several_dtypes),
]


def test_the_folders_are_good_before_they_are_broken(family, folder):
    params, config = load_folder(folder)
    assert config == CASES[family]
    assert jax.tree.all(jax.tree.map(np.array_equal, params, families.random_params(config)))


@pytest.mark.parametrize("broken", FILES, ids=lambda f: f.__name__)
def test_weights_that_do_not_fit_are_refused(folder, broken):
    words = broken(folder)
    message = refusal(folder)
    assert [word for word in words if word not in message] == [], message


def test_layers_of_several_dtypes_are_taken_where_a_dtype_is_asked_for(family, folder):
    layers_of_several_dtypes(folder)
    params, _ = load_folder(folder, np.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}


LONGROPE = {"rope_type": "longrope", "factor": 2.0}
CONFIGS = {  # where the change is made, the change, and the words of the refusal
    "an unsupported family": ("", {"model_type": "mamba"}, ["model_type='mamba'", "expected one of", "llava_next"]),
    "no family": ("", {"model_type": None}, ["model_type=None", "expected one of", "gemma3_text"]),
    "a family that is a list": ("", {"model_type": ["llama"]}, ["model_type=['llama']", "expected one of"]),
    "an attribute of a newer version": ("", {"attention_sinks": 4}, ["attention_sinks=4", "is not handled"]),
    "one of the decoder": ("text", {"attention_sinks": 4}, ["attention_sinks=4", "is not handled"]),
    "a misspelt attribute": ("text", {"hiden_size": 64}, ["hiden_size=64", "did you mean hidden_size"]),
    "quantised weights": (
        "",
        {"quantization_config": {"quant_method": "fp8"}},
        ["quantization_config={'quant_method': 'fp8'}", "expected None"],
    ),
    "quantised weights of the decoder": (
        "text",
        {"quantization_config": {"quant_method": "fp8"}},
        ["quantization_config={'quant_method': 'fp8'}", "expected None"],
    ),
    "rotary positions unknown": ("text", {"rope_scaling": LONGROPE}, ["'longrope'", "expected one of default"]),
    "rotary positions unknown, new spelling": (
        "text",
        {"rope_scaling": None, "rope_parameters": LONGROPE},
        ["'longrope'", "expected one of default"],
    ),
    "no rotary setting": ("text", {"rope_scaling": "linear"}, ["rope_scaling='linear'", "expected an object"]),
    "a factor that is a word": (
        "text",
        {"rope_scaling": {"rope_type": "linear", "factor": "4"}},
        ["rope_scaling.factor='4'", "expected a number above 0"],
    ),
    "a size that is a word": ("text", {"hidden_size": "32"}, ["hidden_size='32'", "expected a whole number above 0"]),
    "a size that is null": ("text", {"hidden_size": None}, ["hidden_size=None", "expected a whole number above 0"]),
    "a size below 0": ("text", {"hidden_size": -32}, ["hidden_size=-32", "expected a whole number above 0"]),
    "a size with a fraction": ("text", {"intermediate_size": 96.5}, ["intermediate_size=96.5", "expected a whole"]),
    "no layers": ("text", {"num_hidden_layers": 0}, ["num_hidden_layers=0", "expected a whole number above 0"]),
    "no heads": ("text", {"num_attention_heads": 0}, ["num_attention_heads=0", "expected a whole number above 0"]),
    "an epsilon that is a word": ("text", {"rms_norm_eps": "1e-6"}, ["rms_norm_eps='1e-6'", "expected a number"]),
    "an epsilon below 0": ("text", {"rms_norm_eps": -1}, ["rms_norm_eps=-1", "expected a number above 0"]),
    "a flag that is a word": ("text", {"tie_word_embeddings": "no"}, ["tie_word_embeddings='no'", "true or false"]),
    "an activation unknown": ("text", {"hidden_act": "relu", "hidden_activation": "relu"}, ["'relu'", "expected"]),
    "an id that is a word": ("", {"eos_token_id": "2"}, ["eos_token_id='2'", "expected an id or a list"]),
    "an id outside the vocabulary": ("", {"eos_token_id": 70_000}, ["eos_token_id=70000", "outside the vocabulary of"]),
    "a text part that is a list": ("", {"text_config": [1]}, ["text_config=[1]", "expected an object"]),
    "a larger vocabulary": ("text", {"vocab_size": 200}, ["embed_tokens.weight has shape", "expected (200, 32)"]),
}
VISION_CONFIGS = {
    "an attribute of a newer version": ({"deepstack": [1]}, ["vision_config.deepstack=[1]", "is not handled"]),
    "a size that is a word": ({"patch_size": "4"}, ["vision_config.patch_size='4'", "expected a whole number above 0"]),
    "a width of null": ({"hidden_size": None}, ["vision_config.hidden_size=None", "expected a whole number above 0"]),
    "an activation unknown": ({"hidden_act": "relu"}, ["vision_config.hidden_act='relu'", "expected"]),
    "larger patches": ({"patch_size": 8}, ["patch_embed", "has shape", "expected"]),
}


def change_config(folder: Path, part: str, changes: dict) -> None:
    def change(attributes):
        place = {"text": "text_config", "vision": "vision_config"}.get(part, "")
        attributes.get(place, attributes).update(changes)

    changed_json(folder / "config.json", change)


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_say_something_else_are_refused(folder, case):
    part, changes, words = CONFIGS[case]
    change_config(folder, part, changes)
    message = refusal(folder)
    file = "safetensors" if "shape" in words[0] else "config.json"
    assert [word for word in [file, *words] if word not in message] == [], message


@pytest.mark.parametrize("case", VISION_CONFIGS)
@pytest.mark.parametrize("family", PICTURED)
def test_configs_of_towers_that_say_something_else_are_refused(folder, case):
    changes, words = VISION_CONFIGS[case]
    change_config(folder, "vision", changes)
    message = refusal(folder)
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("family", ["gemma3_text"])
@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
def test_either_kind_of_layer_is_looked_at(folder, kind):
    changed_json(folder / "config.json", lambda a: a["rope_parameters"][kind].update(LONGROPE))
    message = refusal(folder)
    assert "longrope" in message and "expected" in message
    changed_json(folder / "config.json", lambda a: a["rope_parameters"].update({kind: "default"}))
    assert f"rope_parameters.{kind}='default'; expected an object" in refusal(folder)


@pytest.mark.parametrize("family", ["llama"])
def test_a_tower_that_a_family_has_no_place_for_is_refused(folder):
    change_config(folder, "", {"vision_config": {"depth": 2}})
    assert "vision_config={'depth': 2} is not handled" in refusal(folder)


CONFIG_FILES = {
    "cut short": (lambda data: data[:100], ["config.json", "is no JSON"]),
    "not text": (lambda data: b"\xff\xfe" + data, ["config.json", "is no JSON"]),
    "a list": (lambda data: b"[1]", ["config.json", "list", "expected"]),
    "empty": (lambda data: b"", ["config.json", "is no JSON"]),
}


@pytest.mark.parametrize("case", CONFIG_FILES)
def test_config_files_that_cannot_be_read_are_refused(folder, case):
    damage, words = CONFIG_FILES[case]
    (folder / "config.json").write_bytes(damage((folder / "config.json").read_bytes()))
    message = refusal(folder)
    assert [word for word in words if word not in message] == [], message


def test_missing_config_is_named(folder):
    (folder / "config.json").unlink()
    assert "config.json is missing; expected a folder" in refusal(folder)


def with_leaf(tree, path: str, change):
    """The tree with one leaf changed, or without it where the change is None."""
    name, _, rest = path.partition("/")
    if rest:
        return tree | {name: with_leaf(tree[name], rest, change)}
    if change is None:
        return {key: value for key, value in tree.items() if key != name}
    return tree | {name: change(tree[name])}


Q = "model/layers/self_attn/q_proj/weight"
TREES = {
    "a missing leaf": (lambda p: with_leaf(p, Q, None), f"{Q} is missing, expected ("),
    "an extra leaf": (lambda p: p | {"more": np.zeros(3, np.float32)}, "more has no published name"),
    "a leaf turned": (lambda p: with_leaf(p, Q, lambda w: np.swapaxes(w, 1, 2)), f"{Q} has shape"),
    "a layer more": (lambda p: with_leaf(p, Q, lambda w: np.concatenate([w, w[:1]])), f"{Q} has shape"),
    "a layer less": (lambda p: with_leaf(p, Q, lambda w: w[1:]), f"{Q} has shape"),
    "more rows": (
        lambda p: with_leaf(p, "model/embed_tokens/weight", lambda w: np.concatenate([w, w])),
        "model/embed_tokens/weight has shape",
    ),
    "several dtypes": (lambda p: with_leaf(p, Q, lambda w: w.astype(np.float16)), "several dtypes, float16, float32"),
    "no floats": (lambda p: jax.tree.map(lambda w: w.astype(np.int8), p), "dtype int8, expected one of bfloat16"),
}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=[False, True], ids=["first", "again"])
def place(request, folder, tmp_path) -> Path:
    """Where an export shall go; "again": an older one is there."""
    out = tmp_path / "exports" / "out"
    out.parent.mkdir()
    if request.param:
        shutil.copytree(folder, out)
    return out


@pytest.mark.parametrize("case", TREES)
def test_parameters_of_another_model_are_not_exported(family, place, tokenizer_dir, case):
    change, words = TREES[case]
    before = contents(place.parent)
    with pytest.raises(ValueError) as error:
        exported(family, place, tokenizer_dir, change(families.random_params(CASES[family])))
    assert words in str(error.value)
    assert contents(place.parent) == before and [p.name for p in place.parent.iterdir()] in ([], ["out"])


def half_a_shard(monkeypatch):
    """The disk is full in the middle of the second file."""
    files, real = [], export.write

    def write(path, entries, arrays):
        real(path, entries, arrays)
        files.append(path)
        if len(files) == 2:
            path.write_bytes(path.read_bytes()[:1000])
            raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(export, "write", write)


def half_a_config(monkeypatch):
    def write(path, value):
        path.write_text("{")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(export, "write_json", write)


def no_tokenizer_copied(monkeypatch):
    def copy(source, target):
        raise OSError(5, "Input/output error", str(source))

    monkeypatch.setattr(export.shutil, "copyfile", copy)


def stopped_by_hand(monkeypatch):
    def write(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "generation_config", write)


def not_moved(monkeypatch):
    """The last step, when an older export has already been moved aside."""
    rename = Path.rename

    def refuse(self, target):
        if self.name.endswith(".partial"):
            raise OSError(13, "Permission denied", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)


FAILURES = [half_a_shard, half_a_config, no_tokenizer_copied, stopped_by_hand, not_moved]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda f: f.__name__)
def test_a_failed_export_leaves_nothing_and_an_older_one_whole(family, place, tokenizer_dir, monkeypatch, failure):
    before = contents(place.parent)
    other = families.random_params(CASES[family], seed=1)
    with monkeypatch.context() as patched:
        failure(patched)
        with pytest.raises((OSError, KeyboardInterrupt)):
            exported(family, place, tokenizer_dir, other)
    assert contents(place.parent) == before and [p.name for p in place.parent.iterdir()] in ([], ["out"])
    exported(family, place, tokenizer_dir, other)  # and the next one succeeds
    assert [p.name for p in place.parent.iterdir()] == ["out"]
    assert contents(place) != before and json.loads((place / "config.json").read_text()) == to_hf(CASES[family])


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_an_export_without_a_tokenizer_is_refused(family, place, tokenizer_dir, tmp_path, name):
    before = contents(place.parent)
    bare = shutil.copytree(tokenizer_dir, tmp_path / "bare")
    (bare / name).unlink()
    with pytest.raises(ValueError) as error:
        exported(family, place, bare)
    assert f"{bare / name} is missing; give a tokenizer folder" in str(error.value)
    assert contents(place.parent) == before and [p.name for p in place.parent.iterdir()] in ([], ["out"])


@pytest.mark.parametrize("family", ["llama"])
def test_a_file_in_the_place_of_an_export_stays(family, tokenizer_dir, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="out is a file, expected a folder or nothing"):
        exported(family, tmp_path / "out", tokenizer_dir)
    assert (tmp_path / "out").read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == ["out"]
