"""A published folder in, trained whole or by adapters, and a folder out."""

import dataclasses
import json
import shutil

import families
import jax
import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from ain_jax import run
from ain_jax.data.images import ImageSettings
from ain_jax.data.packing import Packing
from ain_jax.experiment import read_bindings, resolve
from ain_jax.models import lora
from ain_jax.models.config import ModelConfig, tiny
from ain_jax.models.multimodal import MultimodalModel, init_params
from ain_jax.stages import export as export_stage
from ain_jax.stages import registry
from ain_jax.stages.common import StageRun
from ain_jax.tokenizer.extend import padded_vocab
from ain_jax.train import losses, watch
from ain_jax.train.optimizer import path_name
from ain_jax.weights.adapters import load_adapters
from ain_jax.weights.export import export_folder
from ain_jax.weights.load import load_folder
from ain_jax.weights.shards import read_json

SETTINGS = ImageSettings(patch_size=4, min_pixels=64, max_pixels=1024)
EXPERIMENT = """
Experiment.name = "folder"
Experiment.stages = {stages}
Model.folder = "{folder}"
Packing.row_tokens = 192
Packing.row_patches = {patches}
Optimizer.learning_rate = 0.01
Trainer.steps = 3
Trainer.rows = 2
Sources.files = {{
    "talks": "{data}/talks.jsonl",
    "texts": "{data}/texts.jsonl",
    "pairs": "{data}/pairs.jsonl",
    "plain": "{data}/plain.jsonl",
}}
Sources.workers = 1
instruct/Mixture.weights = {{"talks": 1.0}}
export/Export.stage = "instruct"
"""
PREFER = """
prefer/Start.stage = "instruct"
prefer/Mixture.weights = {{"pairs": 1.0}}
"""
LORA = """
Lora.rank = 2
Lora.targets = ("q_proj", "down_proj", "attn/proj")
"""


WATCH = """
Sources.held_out = {{"plain": 0.5}}
Watch.texts = ("plain",)
Watch.every = 2
Watch.stop_rise = {{"plain": 5.0}}
"""


@pytest.fixture(scope="module")
def folders(tokenizer, tokenizer_folder, tmp_path_factory):
    """A Qwen2-VL and a Llama as their makers publish them."""
    root, token = tmp_path_factory.mktemp("published"), tokenizer.convert_tokens_to_ids
    ids = {f"{name}_token_id": token(f"<|{text}|>") for name, text in {"image": "image_pad", "eos": "im_end"}.items()}
    ids |= {f"{name}_token_id": token(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    ids["video_token_id"] = token("<|video_pad|>")
    rows = padded_vocab(len(tokenizer), 64)
    seen = tiny(vocabulary=rows)
    pictures = ModelConfig(seen.text, seen.vision, **ids)
    text = ModelConfig(
        tiny(vocabulary=rows, mrope_section=None, qkv_bias=False).text, family="llama", eos_token_id=ids["eos_token_id"]
    )
    tiled = families.llava("llama")
    decoder = dataclasses.replace(tiled.text, vocabulary=rows)
    tiled = dataclasses.replace(tiled, text=decoder, **{k: ids[k] for k in ("image_token_id", "eos_token_id")})
    for name, config, settings in (
        ("qwen2_vl", pictures, SETTINGS),
        ("llama", text, None),
        ("llava_next", tiled, families.picture_settings(tiled)),
    ):
        export_folder(init_params(config, jax.random.key(0)), config, tokenizer_folder, settings, root / name)
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Conversations, some about a picture, and pairs."""
    folder = tmp_path_factory.mktemp("data")
    Image.new("RGB", (16, 24), "red").save(folder / "red.png")
    talk = lambda ask, say: [{"role": "user", "content": ask}, {"role": "assistant", "content": say}]
    talks = [{"messages": talk(f"كم {n}؟", f"هذه {n}")} for n in range(8)]
    seen = [{"messages": talk("<image>ما هذا؟", "أحمر"), "images": ["red.png"]}]
    pairs = [{"messages": talk(f"كم {n}؟", f"هذه {n}"), "rejected": "لا"} for n in range(8)]
    plain = [{"text": f"هذه الكلمة {n} and words " + "هي الحرية " * n} for n in range(12)]
    for name, lines in (("talks", talks + seen), ("texts", talks), ("pairs", pairs), ("plain", plain)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def go(root, text, *more):
    file = root / "folder.gin"
    file.write_text(text, encoding="utf-8")
    return run.main(["--exp", str(file), "--run_dir", str(root / "run"), *more])


def experiment(folder, data, stages='("instruct", "export")', extra="", patches=64):
    text = EXPERIMENT.format(folder=folder, data=data, stages=stages, patches=patches)
    return text + extra.format(data=data)


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b))


def first_loss(root, stage="instruct"):
    return json.loads((root / "run" / stage / "metrics.jsonl").read_text("utf-8").splitlines()[0])["loss"]


@pytest.fixture(scope="module")
def adapted(folders, data, tmp_path_factory):
    """A run in which two stages one after another train adapters."""
    root = tmp_path_factory.mktemp("adapted")
    extra = LORA + PREFER + WATCH + "prefer/Lora.dora = True\n"
    assert go(root, experiment(folders / "qwen2_vl", data, '("instruct", "prefer", "export")', extra)) == 0
    return root


def test_adapters_are_trained_beside_the_folder_and_exported_alone(adapted, folders):
    base, config = load_folder(folders / "qwen2_vl")
    pairs, settings = load_adapters(adapted / "run" / "export", config, base)
    assert (settings.rank, len(settings.targets)) == (2, 3)
    moved = {path.rpartition("/")[2]: float(np.abs(b).max()) for path, _, b in lora.pairs(pairs)}
    assert moved.keys() == {"q_proj", "down_proj", "proj"} and all(size > 1e-4 for size in moved.values())
    assert read_json(adapted / "run" / "export" / "adapter_config.json")["base_model_name_or_path"] == str(
        folders / "qwen2_vl"
    )
    checkpoint = sum(p.stat().st_size for p in (adapted / "run" / "instruct" / "checkpoints").rglob("*") if p.is_file())
    assert checkpoint < 4 * (folders / "qwen2_vl" / "model.safetensors").stat().st_size
    told = read_json(adapted / "run" / "instruct" / "learns.json")
    assert told["learns"] == lora.count(pairs)
    assert {part["module"] for part in told["modules"] if part["by"] == "rank 2, alpha 16"} == {
        "visual/blocks/attn", "model/layers/mlp", "model/layers/self_attn"
    }  # fmt: skip


def test_a_dry_run_tells_what_learns_of_a_folder(folders, data, tmp_path, capsys):
    text = experiment(folders / "qwen2_vl", data, extra='Optimizer.rates = {{"visual": 0.0}}\n')
    assert go(tmp_path, text, "--dry_run") == 0 and not (tmp_path / "run").exists()
    told = capsys.readouterr().err
    assert "instruct: what learns" in told and "visual/merger" in told and "frozen" in told
    assert go(tmp_path, text.replace('"visual"', '"visul"'), "--dry_run") == 1
    assert "Optimizer.rates names 'visul'" in capsys.readouterr().err


def test_merged_they_are_a_folder_of_the_same_kind(adapted, folders, tmp_path):
    base, config = load_folder(folders / "qwen2_vl")
    pairs, settings = load_adapters(adapted / "run" / "export", config, base)
    arguments = ["--run", str(adapted / "run"), "--stage", "instruct", "--merge_lora", "--out", str(tmp_path / "whole")]
    assert export_stage.main(arguments) == 0
    merged, its_config = load_folder(tmp_path / "whole")
    assert its_config == config and same(merged, lora.merge(base, pairs, settings)) and not same(merged, base)
    card = (tmp_path / "whole" / "README.md").read_text("utf-8")
    assert "base_model: qwen2_vl" in card and "at step" not in card
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert names == {path.name for path in (folders / "qwen2_vl").iterdir()}


def test_the_reference_of_preferences_is_the_model_that_they_begin_with(adapted, capsys):
    assert first_loss(adapted, "prefer") == pytest.approx(np.log(2), abs=1e-5)
    assert (
        export_stage.main(["--run", str(adapted / "run"), "--stage", "prefer", "--out", str(adapted / "second")]) == 0
    )
    # What it lies over, the base and the adapters before it, is no folder that could be named.
    told = read_json(adapted / "second" / "adapter_config.json")
    assert told["base_model_name_or_path"] is None and told["use_dora"]


def test_held_out_text_is_watched_in_every_stage(adapted, folders):
    """Conversations and pairs, whole weights and adapters: of each the same documents, against sums by hand."""
    found = {stage: watch.read(adapted / "run" / stage) for stage in ("instruct", "prefer")}
    assert [line["step"] for line in found["instruct"]] == [line["step"] for line in found["prefer"]] == [0, 2, 3]
    resolved = resolve(read_bindings(adapted / "folder.gin"), registry.SETTINGS)
    stage = StageRun(resolved, adapted / "run", "instruct")
    texts = stage.examples("plain", "test", Packing(row_tokens=192))
    params, config = load_folder(folders / "qwen2_vl")
    model, nats, size = MultimodalModel(config), 0.0, 0
    with jax.numpy_rank_promotion("allow"):
        for n in range(len(texts)):
            tokens_L = texts.tokens_T[texts.starts_S[n] : texts.starts_S[n + 1]]
            L = len(tokens_L)
            places = {"segments_BL": np.ones((1, L), np.int32), "positions_3BL": np.tile(np.arange(L), (3, 1, 1))}
            hidden_BLD = model.apply({"params": params}, tokens_BL=tokens_L[None], **places)
            logits_LV = model.apply({"params": params}, hidden_BLD, method="logits")[0]
            nats -= float(jax.nn.log_softmax(logits_LV)[np.arange(L - 1), tokens_L[1:]].sum())
            size += int(stage.token_bytes_V[tokens_L[1:]].sum())
    whole = sum(len(record.text.encode()) for record in stage.records("plain", "test")[0])
    assert 2 < len(texts) < 10 and whole <= size <= whole + len(texts)  # a space before the first word
    assert found["instruct"][0]["plain"] == pytest.approx(nats / np.log(2) / size, rel=1e-4)
    # The next stage begins where this one ended, its adapters now in the weights.
    assert found["prefer"][0]["plain"] == pytest.approx(found["instruct"][-1]["plain"], rel=1e-4)
    assert found["instruct"][-1] != found["instruct"][0] and found["prefer"][-1] != found["prefer"][0]
    told = read_json(adapted / "run" / "prefer" / "result.json")["numbers"]["watched"]
    assert told == {"plain": [found["prefer"][0]["plain"], found["prefer"][-1]["plain"]]}


TALKS = """
Sources.files = {{"talks": "{data}/talks.jsonl", "plain": "{data}/plain.jsonl", "plain_ar": "{data}/more.jsonl"}}
Sources.languages = {{"talks": "ar", "plain": "ar", "plain_ar": "ar"}}
Sources.held_out = {{"talks": 0.6, "plain": 0.5, "plain_ar": 0.5}}
Watch.texts = ("talks", "plain/ar", "plain_ar")
Watch.row_tokens = 64
"""


@pytest.fixture(scope="module")
def seen(data):
    """Every third conversation is about a picture."""
    folder = data / "seen"
    folder.mkdir()
    (folder / "red.png").write_bytes((data / "red.png").read_bytes())
    for n, line in enumerate(lines := [json.loads(line) for line in (data / "texts.jsonl").open()]):
        if n % 3 == 0:
            line["images"] = ["red.png"]
            line["messages"][0]["content"] = f"<image>{n}؟"
    plain = [json.loads(line) for line in (data / "plain.jsonl").open()]
    more = [{"text": line["text"][::-1]} for line in plain]
    for name, rows in (("talks", lines), ("plain", plain), ("more", more)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def test_answers_are_watched_with_and_without_pictures(folders, seen, tmp_path):
    """In batches with pictures and batches without; against rows that hold one conversation each."""
    assert go(tmp_path, experiment(folders / "qwen2_vl", seen, '("instruct",)', TALKS)) == 0
    (first, *_) = watch.read(tmp_path / "run" / "instruct")
    stage = StageRun(resolve(read_bindings(tmp_path / "folder.gin"), registry.SETTINGS), tmp_path / "run", "instruct")
    params, _ = load_folder(folders / "qwen2_vl")
    loss = losses.next_token(stage.model, 1, losses.PLAIN, stage.token_bytes_V)
    alone = jax.jit(lambda batch: loss(params, {}, batch, None).parts["bits_per_byte"])

    def by_hand(text):
        packing = Packing(row_tokens=64, row_patches=64, window=1, too_long="split")
        examples = stage.examples(text, "test", packing)
        rows = stage.rows({text: examples}, None, None, "alone", packing=packing)
        sums = [alone(batch) for batch, _ in stage.batches(rows, 1)]
        return sum(float(bits.sum()) for bits, _ in sums) / sum(float(size.sum()) for _, size in sums), examples

    for text in ("talks", "plain/ar", "plain_ar"):  # of which the last two are two
        value, examples = by_hand(text)
        assert first[text] == pytest.approx(value, rel=1e-4)
        assert bool(len(examples.grids_M3)) == (text == "talks") and len(examples) > 2
    assert first["plain/ar"] != first["plain_ar"]
    plans = {path.name for path in (tmp_path / "run" / "instruct").glob("watch_*")}
    assert plans == {"watch_talks", "watch_plain%2Far", "watch_plain_ar"}


def test_preferences_are_no_text_to_watch(folders, data, tmp_path, capsys):
    text = experiment(folders / "qwen2_vl", data, '("instruct",)', 'Watch.texts = ("pairs",)\n')
    assert go(tmp_path, text + 'Sources.held_out = {"pairs": 0.5}\n') == 1
    told = capsys.readouterr().err
    assert "instruct/Watch.texts names 'pairs', of whose" in told and "are preferences" in told


def test_runs_that_share_are_what_they_are_alone(folders, data, tmp_path):
    text = experiment(folders / "llama", data, '("instruct",)', WATCH, patches=0).replace("talks", "texts")
    alone, shared, programs = tmp_path / "alone", tmp_path / "shared", {}
    for root in (alone, shared):
        root.mkdir()
        (root / "folder.gin").write_text(text, encoding="utf-8")

    def begin(root, name, *bindings, **more):
        asked = [part for binding in bindings for part in ("--set", binding)]
        asked += ["--data_dir", str(root / "data")] if more else []
        where = ["--exp", str(root / "folder.gin"), "--run_dir", str(root / name)]
        assert run.main([*where, *asked], **more) == 0
        return (root / name / "instruct" / "watch.jsonl").read_text("utf-8")

    one, other = (begin(shared, f"seed_{n}", f"Experiment.seed={n}", programs=programs) for n in (1, 2))
    assert other == begin(alone, "seed_2", "Experiment.seed=2") != one
    assert sorted(name for name, *_ in programs) == ["step", "watch"]
    # Another rate is another step; and what the data are built for is built once.
    begin(shared, "faster", "Optimizer.learning_rate=0.02", programs=programs)
    assert sorted(name for name, *_ in programs) == ["step", "step", "watch", "watch"]
    assert not (shared / "seed_1" / "data").exists() and (alone / "seed_2" / "data").is_dir()


@pytest.mark.parametrize("family", ["qwen2_vl", "llama", "llava_next"])
def test_the_whole_folder_is_trained_and_keeps_its_form(folders, data, tmp_path, family):
    text = experiment(folders / family, data, patches=0 if family == "llama" else 64)
    if family == "llama":
        text = text.replace("talks", "texts")
    assert go(tmp_path, text, "--set", 'export/Export.dtype="bfloat16"') == 0
    (base, config), (params, its_config) = load_folder(folders / family), load_folder(tmp_path / "run" / "export")
    assert its_config == config
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    moved = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a, np.float32) - np.asarray(b)).max()), params, base)
    # Of a tower that is read before its last layer; and what adds the same to all scores of a query changes none.
    unused = ("last_layers", "post_layernorm", "k_proj/bias")
    for path, size in jax.tree_util.tree_leaves_with_path(moved):
        assert size > 1e-3 or any(name in path_name(path) for name in unused), path_name(path)


def test_it_begins_with_the_loss_of_the_folder(folders, data, tmp_path):
    for name, extra in (("whole", ""), ("pairs", LORA)):
        (tmp_path / name).mkdir()
        assert go(tmp_path / name, experiment(folders / "qwen2_vl", data, extra=extra)) == 0
    # Adapters add nothing at first.
    assert first_loss(tmp_path / "whole") == first_loss(tmp_path / "pairs") > 1


@pytest.mark.parametrize(
    "change, words",
    [
        ("Model.width = 32", "has sizes of its own: leave width out"),
        ('Model.folder = "nowhere"', "Model.folder = 'nowhere' is not there"),
        ('Model.folder = ""', "width, layers, heads, kv_heads, mlp_width, vision_width, vision_layers, vision_heads"),
        ("Lora.rank = 2\nOptimizer.matrix_rate = 0.1", "Optimizer.matrix_rate = 0.1 is for whole matrices"),
        ('Lora.rank = 2\nLora.targets = ("q_prog",)', "targets names 'q_prog', which no matrix ends in"),
        (
            'Optimizer.rates = {"visual/mergr": 0.0}',
            "names 'visual/mergr', which no parameter lies under: did you mean",
        ),
        ('Watch.texts = ("pairs",)', "names 'pairs', of which nothing is held out: set Sources.held_out = {'pairs': "),
        ('Watch.texts = ("plian",)', "names 'plian', which is no source: did you mean 'plain'?"),
        ("export/Export.merge_lora = True", "trains the whole weights, no adapters; leave it out"),
        ('export/Export.stage = "instruc"', "stage 'instruc' trains no weights: expected one of instruct"),
    ],
)
def test_what_does_not_fit_is_told(folders, data, tmp_path, capsys, change, words):
    text = experiment(folders / "qwen2_vl", data)
    name = change.partition(" =")[0]
    kept = [line for line in text.splitlines() if not line.startswith(name)]
    assert go(tmp_path, "\n".join([*kept, change]) + "\n") == 1
    assert words in capsys.readouterr().err


def test_a_model_without_a_tower_reads_no_pictures(folders, data, tmp_path, capsys):
    assert go(tmp_path, experiment(folders / "llama", data)) == 1
    assert "Packing.row_patches = 64, and this llama reads no pictures: set 0" in capsys.readouterr().err


def test_tiles_are_not_cut_by_a_row(folders, data, tmp_path, capsys):
    assert go(tmp_path, experiment(folders / "llava_next", data, patches=40)) == 1
    assert "Packing.row_patches = 40: expected whole tiles, a multiple of 16" in capsys.readouterr().err


def test_a_folder_is_extended_from_its_own_tokenizer_alone(folders, data, tmp_path, capsys):
    stages = '("extend_tokenizer", "instruct", "export")'
    more = 'extend_tokenizer/Tokenizer.base = "sample:tokenizer/mistral_v1.model"\n'
    assert go(tmp_path, experiment(folders / "qwen2_vl", data, stages, more), "--set", "Experiment.seed=1") == 1
    assert "a published model reads with its own tokenizer; leave Tokenizer.base out" in capsys.readouterr().err


def test_a_base_without_a_template_gets_the_one_that_is_named(folders, data, tmp_path):
    """Its special tokens take new rows, and travel with the export."""
    base = tmp_path / "base"
    shutil.copytree(folders / "llama", base)
    (base / "chat_template.jinja").unlink()
    written = read_json(base / "tokenizer_config.json")
    (base / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in written.items() if k != "chat_template"}))
    text = experiment(base, data, extra='Chat.template = "llama3"\n', patches=0).replace('talks": 1.0', 'texts": 1.0')
    assert go(tmp_path, text) == 0
    exported = AutoTokenizer.from_pretrained(str(tmp_path / "run" / "export"))
    before = AutoTokenizer.from_pretrained(str(base))
    end = exported.convert_tokens_to_ids("<|eot_id|>")
    assert exported.eos_token == "<|eot_id|>" and end >= len(before)
    assert "<|eot_id|>" in exported.chat_template and before.chat_template is None
    assert exported.encode("كم 3؟ two") == before.encode("كم 3؟ two")
    said = exported.apply_chat_template([{"role": "user", "content": "x"}], tokenize=True, return_dict=False)
    params, config = load_folder(tmp_path / "run" / "export")
    assert max(said) < config.text.vocabulary == params["model"]["embed_tokens"]["weight"].shape[0]
    assert end in read_json(tmp_path / "run" / "export" / "generation_config.json")["eos_token_id"]
