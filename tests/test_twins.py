"""Each experiment of a paper has a twin in small: it changes sizes, steps, data and paths alone, and it runs."""

import dataclasses
import json
from pathlib import Path

import pytest

from ain_jax import run
from ain_jax.experiment import read_bindings, resolve
from ain_jax.stages import registry
from ain_jax.twins import data, models

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
FULL = sorted(path.name.removesuffix("_twin.gin") for path in EXPERIMENTS.glob("*_twin.gin"))
PAPERS = ["ain_7b", "allam_13b", "allam_70b", "allam_7b", "allam_7b_scratch", "gemmar_7b", "llamar_8b", "pangea_7b"]
# What a twin may set otherwise than its full file, and why.
ALLOWED = {
    "Experiment.name": "the folder of its run",
    "Experiment.description": "what it is",
    "Model.folder": "path",
    "Model.origin": "path",
    "Model.vision_folder": "path",
    "Model.vision_origin": "path",
    "Model.size": "size",
    "Tokenizer.base": "path",
    "Tokenizer.origin": "path",
    "Tokenizer.pieces": "size",
    "Sources.files": "data",
    "Sources.origins": "data",
    "Sources.images": "data",
    "Sources.held_out": "data: a larger share of less",
    "Sources.workers": "two cores",
    "Mixture.temperature": "data: all languages but one have as many names",
    "ImageSettings.max_pixels": "size",
    "Packing.row_tokens": "size",
    "Packing.row_patches": "size",
    "Packing.row_targets": "size",
    "Trainer.rows": "size",
    "Trainer.accumulate": "size",
    "Trainer.steps": "steps",
    "Optimizer.warmup_steps": "steps",
    "Watch.every": "steps",
    "Watch.rows": "size",
    "Watch.row_tokens": "size",
    "Mesh.tensor": "one device",
    "Export.base": "the card names no model that it is not made of",
    "Export.data": "data",
}


def overrides(name):
    """What a twin binds behind its full file."""
    full, twin = (read_bindings(EXPERIMENTS / f"{name}{end}.gin") for end in ("", "_twin"))
    assert twin[: len(full)] == full, f"{name}_twin.gin does not begin with its full file"
    return twin[len(full) :]


def settled(name):
    return resolve(read_bindings(EXPERIMENTS / f"{name}.gin"), registry.SETTINGS)


def test_every_paper_has_a_twin():
    assert FULL == PAPERS


@pytest.mark.parametrize("name", PAPERS)
def test_a_twin_changes_sizes_steps_data_and_paths_alone(name):
    refused = [b.where for b in overrides(name) if f"{b.selector}.{b.argument}" not in ALLOWED]
    assert not refused
    full, twin = settled(name), settled(f"{name}_twin")
    assert twin.experiment.stages == full.experiment.stages
    assert set(twin.settings["export"]) == set(full.settings["export"])


def test_no_allowance_is_unused():
    used = {f"{b.selector}.{b.argument}" for name in PAPERS for b in overrides(name)}
    assert used == set(ALLOWED)


@pytest.mark.parametrize("name", ["allam_13b", "allam_70b"])
def test_the_larger_allams_do_what_the_smallest_does(name):
    """Their twins differ by a rate and by how many times a batch is cut: what `allam_7b_twin` runs, they run."""
    one, other = settled("allam_7b_twin"), settled(f"{name}_twin")
    found = set()
    for stage in one.experiment.stages:
        for cls, settings in one.settings[stage].items():
            theirs = other.settings[stage][cls]
            fields = [field.name for field in dataclasses.fields(settings)]
            found |= {f"{stage}/{cls}.{f}" for f in fields if getattr(settings, f) != getattr(theirs, f)}
    assert found == ({"pretrain/Optimizer.learning_rate"} if name == "allam_70b" else set())


def test_what_is_missing_is_told_with_where_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    told = [
        "Model.folder = 'models/Qwen2-7B-Instruct' is not there: download Qwen/Qwen2-7B-Instruct from the Hugging Face "
        "hub, into models/Qwen2-7B-Instruct",
        "Model.vision_folder = 'models/clip-vit-large-patch14-336' is not there: save openai/clip-vit",
        "Sources.files['pangea']: data/PangeaInstruct/PangeaIns.json: no such file or folder; there is no folder "
        "data/PangeaInstruct: download neulab/PangeaInstruct from the Hugging Face hub, and unpack its images beside "
        "it, into data/PangeaInstruct/PangeaIns.json",
    ]
    for more, status in ((("--dry_run",), 0), ((), 1)):
        assert run.main(["--exp", str(EXPERIMENTS / "pangea_7b.gin"), *more]) == status
        written = capsys.readouterr()
        assert all(line in written.err for line in told)
        assert ("projector/Optimizer.learning_rate = 0.001" in written.out) == (status == 0)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder with what `python -m ain_jax.twins` writes."""
    root = tmp_path_factory.mktemp("twins")
    models.write_models(root / "twins" / "models")
    data.write_data(root / "twins" / "data")
    return root


@pytest.fixture
def go(begun, monkeypatch):
    """Runs a twin as a user does, and gives its numbers and what transformers makes of its export."""
    monkeypatch.chdir(begun)

    def start(name, opened):
        assert run.main(["--exp", str(EXPERIMENTS / f"{name}_twin.gin")]) == 0
        folder = begun / "runs" / f"{name}_twin"
        transformers = pytest.importorskip("transformers")
        pytest.importorskip("torch")
        model, loading = getattr(transformers, opened).from_pretrained(folder / "export", output_loading_info=True)
        assert not any(loading.values()), loading
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "export")
        assert len(tokenizer) <= model.get_input_embeddings().weight.shape[0]
        return json.loads((folder / "summary.json").read_text("utf-8"))["stages"], model, tokenizer

    return start


def assert_watched(numbers, *stages, still=()):
    """Both languages, before and after each stage that trains; in some nothing that reads text learns."""
    assert {stage for stage in numbers if "watched" in numbers[stage]} == set(stages)
    for stage in stages:
        assert set(numbers[stage]["watched"]) == {"watch_ar", "watch_en"}
        for before, after in numbers[stage]["watched"].values():
            assert 0 < after < 99 and (before == after) == (stage in still)


def test_ain(go):
    numbers, _, tokenizer = go("ain_7b", "Qwen2VLForConditionalGeneration")
    assert_watched(numbers, "instruct")
    assert numbers["instruct"]["steps"] > 4 and tokenizer.convert_tokens_to_ids("<|image_pad|>") is not None


def test_allam(go):
    numbers, _, tokenizer = go("allam_7b", "LlamaForCausalLM")
    assert numbers["extend_tokenizer"]["new_pieces"] == 300
    assert len(tokenizer) == 32000 + 1 + 300 and tokenizer.pad_token_id == 32000
    groups = ("arabic/ar", "arabic_translated/ar", "english/en", "code/code", "bitext/ar-en")
    assert {f"loss/{group}" for group in groups} <= set(numbers["pretrain"]["last"])
    for stage in ("pretrain", "instruct", "prefer"):
        assert set(numbers[stage]["watched"]) == {"vocabulary_ar", "vocabulary_en"}
    lines = (Path("runs") / "allam_7b_twin" / "pretrain" / "watch.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 10, 20]
    # 160 conversations three times, and each pair once.
    assert numbers["instruct"]["steps"] > numbers["prefer"]["steps"] > 2


def test_allam_from_random_weights(go):
    _, model, _ = go("allam_7b_scratch", "LlamaForCausalLM")
    assert model.config.rope_parameters["rope_theta"] == 1e6
    lines = (Path("runs") / "allam_7b_scratch_twin" / "pretrain" / "metrics.jsonl").read_text("utf-8").splitlines()
    heard = [[key for key in json.loads(line) if key.startswith("loss/arabic")] for line in lines]
    assert not any(heard[:15]) and any(heard[15:])  # four of 5.2 parts are English alone


@pytest.mark.parametrize(("name", "opened"), [("llamar_8b", "LlamaForCausalLM"), ("gemmar_7b", "GemmaForCausalLM")])
def test_instar(go, name, opened):
    numbers, *_ = go(name, opened)
    assert_watched(numbers, "instruct")
    (folder,) = (Path("runs") / f"{name}_twin" / "data" / "files").glob("instar-*")
    told = json.loads(next(folder.glob("*/summary.json")).read_text("utf-8"))
    # 180 rows, every ninth (20) with an answer in English; every twentieth (9) stands there twice, one of them English.
    assert (told["rows"], told["rejected"], told["left_out"]) == (180 + 9, 0, 20 + 9)
    assert told["reasons"]["the same is said elsewhere already"] == 8


def test_pangea(go):
    numbers, model, tokenizer = go("pangea_7b", "LlavaNextForConditionalGeneration")
    assert_watched(numbers, "projector", "instruct", still=("projector",))
    assert {f"loss/pangea/{language}" for language in data.NAMED_IN} <= set(numbers["instruct"]["last"])
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<image>")
