"""Small experiments planned for real topologies, by the command that users type; needs libtpu, and no TPU."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ain_jax.plan import command

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'ain_jax[tpu]', on Linux"
)

# The widths of ain_7b in two layers of each tower: what is wrong with a 28-layer plan is wrong here, sooner.
EXPERIMENT = """
Experiment.name = "short"
Experiment.stages = ("extend_tokenizer", "instruct", "prefer")
extend_tokenizer/Tokenizer.base = "sample:tokenizer/mistral_v1.model"
Model.width = 3584
Model.layers = 2
Model.heads = 28
Model.kv_heads = 4
Model.mlp_width = 18944
Model.vision_width = 1280
Model.vision_layers = 2
Model.vision_heads = 16
Model.mrope_section = (16, 24, 24)
Model.tied = False
Model.remat = "full"
Model.dtype = "bfloat16"
Packing.row_tokens = 1024
Packing.row_patches = 1024
Packing.row_targets = 256
ImageSettings.max_pixels = 100352
Mesh.data = 1
Mesh.fsdp = -1
Optimizer.learning_rate = 1e-5
Trainer.rows = 16
instruct/Mixture.weights = {"read": 1.0}
instruct/Trainer.steps = 100
prefer/Mixture.weights = {"preference": 1.0}
prefer/Trainer.steps = 10
"""


def plan(folder: Path, *arguments: str) -> tuple[int, dict, str]:
    """(exit status, the JSON, what was printed) of one plan, in a process of its own."""
    file, out = folder / "short.gin", folder / "plan.json"
    file.write_text(EXPERIMENT, encoding="utf-8")
    command_line = [sys.executable, "-m", "ain_jax.plan", "--exp", str(file), "--out", str(out), *arguments]
    command_line += ["--run_dir", str(folder / "run")]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command_line, capture_output=True, text=True, env=environment, cwd=folder, timeout=600)
    assert out.is_file() or done.returncode == 1, done.stdout + done.stderr[-3000:]
    return done.returncode, json.loads(out.read_text("utf-8")) if out.is_file() else {}, done.stdout + done.stderr


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    return plan(tmp_path_factory.mktemp("plan"), "--plan", "v5e-16", "--price", "2", "--stage", "instruct")


def test_figures_of_a_short_ain_7b(planned):
    status, made, text = planned
    assert status == 0 and "fits" in text, text
    found = made["stages"]["instruct"]
    layer = 3584 * (28 + 8) * 128 + (28 + 8) * 128 + 28 * 128 * 3584 + 3 * 3584 * 18944 + 2 * 3584
    block = 1280 * 3840 + 3840 + 1280 * 1280 + 1280 + 2 * 1280 * 5120 + 5120 + 1280 + 4 * 1280
    merger = 2 * 1280 + 5120 * 5120 + 5120 + 5120 * 3584 + 3584
    tables = 2 * math.ceil((32000 + 2000) / 64) * 64 * 3584
    assert abs(found["parameters"] - (tables + 2 * layer + 3584 + 2 * block + 1176 * 1280 + merger)) <= 2 * 3584 * 64
    assert found["trained"] == found["parameters"]
    memory = found["memory"]
    # float32, nearly all of it cut in 16; Adam keeps two more of each
    assert memory["parameters"] == pytest.approx(4 * found["parameters"] / 16, rel=0.02)
    assert memory["optimizer"] == pytest.approx(2 * memory["parameters"], rel=0.01)
    assert memory["arguments"] <= memory["peak"] <= memory["limit"]
    assert memory["arguments"] < memory["live"] <= memory["peak"]  # of arrays alone
    # Every layer of the decoder gathers its matrices, forwards and again backwards, in bfloat16 or float32.
    gathered = sum(c["bytes"] for c in found["collectives"] if c["kind"].startswith("all-gather"))
    assert gathered >= 2 * 2 * layer * 2
    needed, every = sum(found["flops_needed"].values()), sum(found["flops_all"].values())
    assert needed < every and needed < found["flops_programmed"] < 2 * every
    assert 0 < found["in_turn"]["mfu_needed"] <= found["overlapped"]["mfu_needed"] < 1
    assert found["in_turn"]["dollars"] == pytest.approx(2 * found["in_turn"]["chip_hours"])
    assert found["hbm_bytes"] > found["hbm_bytes_once"] > 0


def test_collectives_of_a_program_by_hand():
    """Two matrices in three layers on 64 chips: gathered forwards and backwards, their gradients added up."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("collectives_for_tpus.py"))],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    made = json.loads(done.stdout.splitlines()[-1])
    assert made["meshes"] == [
        ["v5p-128", {"fsdp": 32, "tensor": 2}],
        ["2xv5p-128", {"slice": 2, "fsdp": 8, "sequence": 8}],
    ]
    found = made["one"]
    matrices = 3 * 2 * 1024 * 512 * 2  # bytes, in bfloat16
    gathers = [c for c in found if c["kind"].startswith("all-gather")]
    sums = [c for c in found if c["kind"] in ("all-reduce", "reduce-scatter")]
    assert sum(c["bytes"] for c in gathers) == 2 * matrices
    assert sum(c["bytes"] for c in sums) in (matrices, 2 * matrices)  # added up in bfloat16 or in float32
    assert len(gathers) + len(sums) == len(found)
    for c in found:
        twice = 2 if "all-reduce" in c["kind"] else 1
        assert c["wire"] == pytest.approx(twice * c["bytes"] * 63 / 64)
    # Of two slices of 16 chips each adds up its gradients, and then a chip its sixteenth with that of the other slice.
    (between,) = [c for c in made["two"] if c["between_slices"]]
    part = 1024 * 512 // 16
    assert (between["kind"], between["count"]) == ("all-reduce", 1)
    assert between["bytes"] == between["wire"] and between["bytes"] in (2 * part, 4 * part)  # bfloat16 or float32


def test_what_does_not_fit_is_told_with_what_would(tmp_path):
    deep = ("--set", "Model.layers=40")  # 10 G parameters on four chips: 31 GB each
    status, made, text = plan(tmp_path, "--plan", "v5e-4", "--stage", "instruct", *deep)
    assert status == command.NOT_FITTING
    found = made["stages"]["instruct"]
    assert not found["fits"]
    assert "does not fit" in text or "DOES NOT FIT" in text
    assert found["would_fit"] is None or found["would_fit"]["peak"] < 15.75 * 2**30


def test_faults_are_told(tmp_path):
    status, _, text = plan(tmp_path, "--plan", "v5e-16", "--stage", "instruct", "--set", "instruct/Trainer.rows=3")
    assert status == 1 and "Trainer.rows = 3" in text and "Traceback" not in text
    status, _, text = plan(tmp_path, "--plan", "v5e-17")
    assert status == 1 and "v5e-16" in text
