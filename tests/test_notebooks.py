"""The notebooks as they are saved: with output, made by the very cells that stand there. `.ci/run` runs them."""

import re
from pathlib import Path

import pytest

from ain_jax import ablation
from ain_jax.experiment import read_bindings, resolve
from ain_jax.stages import registry

nbformat = pytest.importorskip("nbformat")
ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST = 200_000  # bytes


def read(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    return notebook, [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_the_four_ablations_are_there():
    names = ["english_share", "forgetting", "language_popularity", "samples_per_language"]
    assert [path.stem for path in NOTEBOOKS] == names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_saved_with_what_its_cells_made(path):
    notebook, cells = read(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))  # from the first to the last
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    told = "".join(output.text for output in outputs if output.output_type == "stream")
    # A cell that was changed afterwards is not what its output came from.
    assert re.search(r"made by these cells \((\w+)\)", told)[1] == ablation.digest(cell.source for cell in cells)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert path.stat().st_size < LARGEST
    assert "ablation." in cells[0].source and "SEEDS = (0, 1, 2)" in cells[0].source
    # What is concluded is computed: nothing between the cells says what came out.
    assert "paired comparisons over 3 seeds" in told
    assert notebook.metadata.kernelspec.name == "python3"


@pytest.mark.parametrize("path", sorted((ROOT / "experiments" / "ablations").glob("*.gin")), ids=lambda path: path.stem)
def test_what_they_run_are_experiments(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    resolved = resolve(read_bindings(path), registry.SETTINGS)
    assert any(name in resolved.experiment.stages for name in ("pretrain", "instruct"))
