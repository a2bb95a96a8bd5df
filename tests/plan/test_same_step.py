"""What a plan compiles is what the loop runs: the lowered text of both, on real data."""

import json

import jax
import pytest
from PIL import Image

from ain_jax import run
from ain_jax.data.images import ImageSettings
from ain_jax.experiment import read_bindings, resolve
from ain_jax.models.config import ModelConfig, tiny
from ain_jax.models.multimodal import init_params
from ain_jax.plan import compile as compiler
from ain_jax.plan.planned import planned
from ain_jax.stages import registry, training, watching
from ain_jax.tokenizer.extend import padded_vocab
from ain_jax.train import reference
from ain_jax.weights.export import export_folder

EXPERIMENT = """
Experiment.name = "planned"
Experiment.stages = ("{stage}",)
Model.folder = "{folder}/model"
Packing.row_tokens = 96
Packing.row_patches = 64
Optimizer.learning_rate = 0.01
Optimizer.rates = {rates}
Trainer.steps = {steps}
Trainer.rows = 2
Trainer.accumulate = {accumulate}
Packing.text_batches = {text_batches}
Watch.texts = {watched}
Sources.held_out = {{"plain": 0.5, "shown": 0.5}}
Sources.files = {{
    "plain": "{folder}/plain.jsonl", "shown": "{folder}/shown.jsonl",
    "talks": "{folder}/talks.jsonl", "pairs": "{folder}/pairs.jsonl", "verdicts": "{folder}/verdicts.jsonl"
}}
Sources.workers = 1
instruct/Mixture.weights = {{"talks": 1.0}}
prefer/Mixture.weights = {{"{judged}": 1.0}}
prefer/Preference.loss = "{loss}"
Lora.rank = {rank}
"""


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def folder(tokenizer, tokenizer_folder, tmp_path_factory):
    """A small Qwen2-VL as its makers would publish it, and a few conversations and pairs."""
    root, token = tmp_path_factory.mktemp("planned"), tokenizer.convert_tokens_to_ids
    ids = {f"{name}_token_id": token(f"<|{text}|>") for name, text in {"image": "image_pad", "eos": "im_end"}.items()}
    ids |= {f"{name}_token_id": token(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    small = tiny(vocabulary=padded_vocab(len(tokenizer), 64))
    config = ModelConfig(small.text, small.vision, video_token_id=token("<|video_pad|>"), **ids)
    images = ImageSettings(patch_size=4, min_pixels=64, max_pixels=1024)
    export_folder(init_params(config, jax.random.key(0)), config, tokenizer_folder, images, root / "model")
    Image.new("RGB", (16, 24), "red").save(root / "red.png")
    talk = lambda ask, say: [{"role": "user", "content": ask}, {"role": "assistant", "content": say}]
    talks = [{"messages": talk(f"كم {n}؟", f"هذه {n}")} for n in range(24)]
    talks += [{"messages": talk(f"<image>ما هذا {n}؟", "أحمر"), "images": ["red.png"]} for n in range(3)]
    pairs = [{"messages": talk(f"كم {n}؟", f"هذه {n}"), "rejected": "لا"} for n in range(8)]
    verdicts = [{"messages": talk(f"كم {n}؟", f"هذه {n}"), "label": n % 2 == 0} for n in range(8)]
    plain = [{"text": f"هذه {n}"} for n in range(8)]
    shown = [{"messages": talk(f"<image>كم {n}؟", "أحمر"), "images": ["red.png"]} for n in range(8)]
    for name, lines in (("plain", plain), ("shown", shown), ("talks", talks), ("pairs", pairs), ("verdicts", verdicts)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return root


def lowered(
    folder, tmp_path, monkeypatch, stage, rank=0, rates="{}", accumulate=1, loss="sigmoid", watched="()", apart=False
):
    """By program, (the loop's text, the plan's text) of the same experiment."""
    file, found = tmp_path / "planned.gin", {}
    judged = "verdicts" if loss == "kto" else "pairs"
    text = EXPERIMENT.format(
        stage=stage,
        folder=folder,
        rank=rank,
        rates=rates,
        accumulate=accumulate,
        judged=judged,
        loss=loss,
        watched=watched,
        text_batches=apart,
        steps=12 if apart else 2,  # so that batches of both shapes come
    )
    file.write_text(text, encoding="utf-8")

    def recorded(module, program):
        make = module.scorer

        def made(*given):
            function = make(*given)

            def call(*arguments):
                seen = program == "reference" or arguments[-1].patches_BPK is not None
                name = program if seen else f"{program} without pictures"
                found.setdefault(name, function.lower(*arguments).as_text())
                return function(*arguments)

            return call

        monkeypatch.setattr(module, "scorer", made)

    def stopped(*, update, state, frozen, batches, key, groups, watch, **rest):
        for batch, _ in batches(0):
            rows = getattr(batch, "rows", batch)
            program = "step, rows without pictures" if rows.patches_BPK is None else "step"
            found.setdefault(program, update.lower(state, frozen, batch, key).as_text())
        found["groups"] = len(groups)
        if watch is not None:
            watch._measure(state.params, frozen)
        raise Stop

    monkeypatch.setattr(training, "train", stopped)
    recorded(reference, "reference")
    recorded(watching, "watched texts")
    with pytest.raises(Stop):
        run.main(["--exp", str(file), "--run_dir", str(tmp_path / "run")])
    resolved = resolve(read_bindings(file), registry.SETTINGS)
    made = planned(resolved, tmp_path / "run", stage, jax.devices())
    monkeypatch.undo()
    groups, plan = found.pop("groups"), {"step": lambda: compiler.trace(made, groups)[0]}
    plan |= {name: make for name, make, _ in compiler.others(made)}
    assert plan.keys() == found.keys()
    with jax.set_mesh(made.mesh):
        return {name: (found[name], make().lower().as_text()) for name, make in plan.items()}


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        ("instruct", {}),
        ("instruct", {"rank": 2, "accumulate": 2}),
        ("prefer", {"rates": '{"visual": 0.0}'}),
        ("prefer", {"loss": "orpo"}),
        ("prefer", {"loss": "kto"}),
        ("instruct", {"apart": True, "watched": '("plain", "shown")', "rank": 2}),
    ],
)
def test_lowers_what_the_loop_runs(folder, tmp_path, monkeypatch, stage, more):
    texts = lowered(folder, tmp_path, monkeypatch, stage, **more)
    others = {"reference": stage == "prefer" and more.get("loss") != "orpo", "watched texts": "watched" in more}
    others |= dict.fromkeys(("step, rows without pictures", "watched texts without pictures"), "apart" in more)
    assert texts.keys() == {"step", *(name for name, there in others.items() if there)}
    for name, (loop, plan) in texts.items():
        assert len(loop) > 50_000, name
        assert loop == plan, name
