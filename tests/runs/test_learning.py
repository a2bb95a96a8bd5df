"""The table of what learns, held against counts made by hand."""

import dataclasses
import json

import pytest

from ain_jax.models.config import tiny
from ain_jax.models.lora import Lora
from ain_jax.models.multimodal import parameter_count
from ain_jax.stages import learning
from ain_jax.train.optimizer import Optimizer


@dataclasses.dataclass
class Stage:
    """As much of a stage's run as the table reads."""

    config: object
    settings: tuple
    folder: object = None
    stage: str = "instruct"
    new_rows: tuple = (180, 10)

    def get(self, cls):
        return next((s for s in self.settings if isinstance(s, cls)), None) or cls()


def table(*settings, tied=False):
    config = tiny(tied=tied)
    found = learning.parts(Stage(config, settings))
    assert sum(part.parameters for part in found) == parameter_count(config)
    return {part.module: part for part in found}


D, F, V, E = 32, 96, 192, 24  # widths of the decoder, its MLP, its vocabulary and the tower of `tiny`


def test_a_frozen_tower_and_its_merger_are_seen():
    found = table(Optimizer(1e-3, rates={"visual": 0.0, "visual/merger": 0.5, "q_proj": 0.0}))
    assert next(iter(found)) == "visual/blocks/attn" and list(found)[-1] == "lm_head"
    told = {module: (part.rate, part.learns) for module, part in found.items()}
    assert told["visual/blocks/attn"] == told["visual/blocks/*norm*"] == told["visual/patch_embed"] == ("frozen", 0)
    merger = 2 * E + 4 * E * (4 * E + 1) + D * (4 * E + 1)
    assert told["visual/merger"] == ("0.5", merger) and found["visual/merger"].parameters == merger
    assert told["model/embed_tokens"] == told["lm_head"] == ("1", V * D)
    assert told["model/layers/mlp"] == ("1", 2 * 3 * D * F)
    attention = found["model/layers/self_attn"]
    assert attention.rate == "1; q_proj, q_proj/bias frozen"
    assert attention.parameters - attention.learns == 2 * (D * 32 + 32)
    # Each line's name is one that rates take, and it names that line alone.
    for module in list(found):
        alone = table(Optimizer(1e-3, rates={module: 0.0}))
        assert [name for name, part in alone.items() if part.rate == "frozen"] == [module]
    assert table(Optimizer(1e-3), tied=True)["lm_head"].rate == "tied to model/embed_tokens"


def test_adapters_are_counted_where_they_stand():
    settings = Lora(rank=4, targets=("q_proj", "v_proj", "mlp/fc1", "lm_head"), rank_pattern={"v_proj": 2})
    found = table(settings, Optimizer(1e-3, rates={"visual": 0.0, "q_proj/b": 16.0}))
    attention = found["model/layers/self_attn"]
    assert attention.by == "rank 4, alpha 16; v_proj rank 2, alpha 16"
    assert attention.learns == 2 * (4 * (D + 32) + 2 * (D + 16))
    assert attention.rate == "a 1 and b 16; v_proj 1; o_proj, k_proj frozen"
    assert (found["visual/blocks/mlp"].learns, found["visual/blocks/mlp"].rate) == (0, "frozen")
    assert found["visual/blocks/mlp"].by == "rank 4, alpha 16"
    assert (found["model/embed_tokens"].learns, found["model/embed_tokens"].rate) == (0, "frozen")
    assert found["lm_head"].learns == 4 * (D + V) and found["model/embed_tokens"].by == ""


def test_new_rows_are_counted_alone(tmp_path, capsys):
    stage = Stage(tiny(tied=False), (Optimizer(1e-3, rows="new"),), tmp_path)
    learning.tell(stage)
    written = json.loads((tmp_path / learning.FILE).read_text())
    assert written["learns"] == 2 * 10 * D and written["parameters"] == parameter_count(stage.config)
    by_module = {part["module"]: part for part in written["modules"]}
    assert by_module["model/embed_tokens"] == {
        "module": "model/embed_tokens", "parameters": V * D, "learns": 10 * D, "rate": "1", "by": "rows 180 to 189"
    }  # fmt: skip
    assert by_module["visual/merger"]["rate"] == "frozen"
    told = capsys.readouterr().err
    assert "instruct: what learns" in told and "rows 180 to 189" in told and "frozen" in told
    assert "of 0.001" in told


def test_a_name_that_is_nowhere_is_told():
    with pytest.raises(ValueError, match="names 'visual/mergr', which no parameter lies under: did you mean"):
        table(Optimizer(1e-3, rates={"visual/mergr": 0.0}))
    with pytest.raises(ValueError, match="names 'k_proj'"):  # no adapter stands there
        table(Lora(rank=2, targets=("q_proj",)), Optimizer(1e-3, rates={"k_proj": 0.0}))
