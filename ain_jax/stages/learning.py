"""What of a model learns in a stage, module by module: a table before its first step, and `learns.json` beside it.

What is frozen unseen is found out after the run: a tower that stays although the words were "full tuning", a projector
frozen along with it. So each module has its line, and a line's name is one that `Optimizer.rates` takes.
"""

import dataclasses
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import unflatten_dict
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ain_jax.experiment import ExperimentError, Resolved
from ain_jax.launching import processes
from ain_jax.models import lora
from ain_jax.models.lora import Lora
from ain_jax.models.multimodal import abstract_params
from ain_jax.stages.common import StageRun, write_json
from ain_jax.train.optimizer import STACKS, Optimizer, path_name, rate_tree
from ain_jax.train.rows import TABLES

FILE = "learns.json"
ORDER = ("visual", "model", "lm_head")  # as a picture goes through them
NAMED = 4  # modules of a line that are named where they differ from the rest of it


@dataclasses.dataclass(frozen=True)
class Part:
    """One line: a module of the model, and what of it learns."""

    module: str
    parameters: int
    learns: int  # of them, or of what stands in for them: adapters, new rows
    rate: str  # "1" times the learning rate, "0.1", "frozen"; "1; q_proj frozen" where not all of it is alike
    by: str  # "rank 8, alpha 16", "rows 32,000 to 32,511", "" where the parameters themselves learn


def parts(run: StageRun) -> list[Part]:
    """The modules of the stage's model in the order of its tree. ValueError: a setting names what is not there."""
    settings, adapted, config = run.get(Optimizer), run.get(Lora), run.config
    shapes = _flat(abstract_params(config))
    learns, rates, by = {name: shape.size for name, shape in shapes.items()}, {}, {}
    if adapted.rank:
        pairs = lora.abstract(adapted, config)
        found, sizes = _flat(rate_tree(pairs, settings.rates)), _flat(pairs)
        learns, rates = dict.fromkeys(shapes, 0), dict.fromkeys(shapes, "frozen")
        for path in lora.targeted(adapted, config):
            own = {name.rpartition("/")[2]: rate for name, rate in found.items() if name.rpartition("/")[0] == path}
            name = f"{path}/weight"
            learns[name] = sum(sizes[f"{path}/{half}"].size for half, rate in own.items() if rate)
            alike = len(set(own.values())) == 1
            each = [_times(rate) if alike else f"{half} {_times(rate)}" for half, rate in own.items()]
            rates[name] = each[0] if alike else " and ".join(each)
            by[name] = f"rank {adapted.rank_of(path)}, alpha {adapted.alpha_of(path):g}"
            by[name] += ", magnitudes" if adapted.dora else ""
    elif settings.rows == "new":
        first, count = run.new_rows
        tables = ["/".join(path) for path in TABLES if "/".join(path) in shapes]
        taken = {name: jax.ShapeDtypeStruct((count, *shapes[name].shape[1:]), shapes[name].dtype) for name in tables}
        found = _flat(rate_tree(unflatten_dict(taken, sep="/"), settings.rates))
        learns = {name: taken[name].size if found.get(name) else 0 for name in shapes}
        rates = {name: _times(found.get(name, 0.0)) for name in shapes}
        by = dict.fromkeys(tables, f"rows {first:,} to {first + count - 1:,}")
    else:
        found = _flat(rate_tree(abstract_params(config), settings.rates))
        learns = {name: shape.size if found[name] else 0 for name, shape in shapes.items()}
        rates = {name: _times(rate) for name, rate in found.items()}
    lines: dict[str, list[str]] = {}
    for name in sorted(shapes, key=lambda name: ORDER.index(name.split("/")[0])):
        lines.setdefault(_module(name), []).append(name)
    return [
        Part(
            module,
            sum(shapes[name].size for name in names),
            sum(learns[name] for name in names),
            _line(module, names, rates, shapes, by),
            _line(module, [n for n in names if n in by], by, shapes, {}),
        )
        for module, names in lines.items()
    ] + ([Part("lm_head", 0, 0, "tied to model/embed_tokens", "")] if config.text.tied else [])


def tell(run: StageRun) -> None:
    """Print the table on standard error and write it down; every process of the run calls this."""
    found = parts(run)
    total = sum(part.parameters for part in found)
    if processes.is_first():
        show(run.stage, found, run.get(Optimizer))
    write_json(
        run.folder / FILE,
        {
            "parameters": total,
            "learns": sum(part.learns for part in found),
            "modules": [dataclasses.asdict(part) for part in found],
        },
    )


def show(stage: str, found: Iterable[Part], settings: Optimizer) -> None:
    """The table on standard error."""
    console = Console(stderr=True, force_jupyter=False)
    if not console.is_terminal:
        console = Console(stderr=True, force_jupyter=False, width=160)  # a log has no width of its own
    drawn = Table(box=box.SIMPLE_HEAD, title=f"{stage}: what learns", title_justify="left")
    drawn.add_column("module", no_wrap=True)
    for name in ("parameters", "learn"):
        drawn.add_column(name, justify="right", no_wrap=True)
    drawn.add_column("times the learning rate")
    found = list(found)
    if adapted := any(part.by for part in found):
        drawn.add_column("by")
    for part in found:
        rate = Text(part.rate)
        rate.highlight_words(["frozen"], "bold yellow")
        cells = [Text(part.module), Text(f"{part.parameters:,}"), Text(f"{part.learns:,}"), rate]
        drawn.add_row(*cells, *([Text(part.by)] if adapted else []))
    total, learns = (sum(getattr(part, name) for part in found) for name in ("parameters", "learns"))
    muon = f", {settings.matrix_rate:g} by Muon for the matrices of the layers" if settings.matrix_rate else ""
    drawn.add_section()
    drawn.add_row("all", f"{total:,}", f"{learns:,}", f"of {settings.learning_rate:g}{muon}")
    console.print(drawn, highlight=False)


def check(resolved: Resolved, root: Path, stages: Iterable[str]) -> None:
    """Refuse rates and adapters of any of these stages that name what its model has not, before the first one runs.

    ExperimentError: all of them.
    """
    faults = []
    for stage in stages:
        settings = resolved.stage(stage)
        if settings[Optimizer.__name__].rates or settings[Lora.__name__].rank:
            try:
                planned_parts(resolved, root, stage)
            except ValueError as fault:
                faults.append(str(fault))
    if faults:
        raise ExperimentError("\n".join(dict.fromkeys(faults)))


def show_planned(resolved: Resolved, root: Path, stages: Iterable[str]) -> None:
    """The tables of the stages of a run that is not begun, as far as the sizes of its model are known.

    ValueError: a setting names what the model has not.
    """
    for stage in stages:
        found, unknown = planned_parts(resolved, root, stage)
        if unknown:
            console = Console(stderr=True, force_jupyter=False)
            console.print(f"{stage}: what learns cannot be told yet: {unknown}", highlight=False)
        else:
            show(stage, found, resolved.stage(stage)[Optimizer.__name__])


def planned_parts(resolved: Resolved, root: Path, stage: str) -> tuple[list[Part], str]:
    """The lines of a stage of a run that is not begun; or none, and why its model's sizes are not known yet.

    ValueError: a setting names what the model has not.
    """
    from ain_jax.plan.planned import planned  # which reads the settings of all stages

    with tempfile.TemporaryDirectory() as nowhere:  # what a template adds to a tokenizer is written there
        run = planned(resolved, root if root.is_dir() else Path(nowhere), stage, ())
        try:
            assert run.config
        except (ValueError, OSError) as fault:
            return [], str(fault)
        try:
            return parts(run), ""
        except ValueError as fault:
            raise ValueError(f"{stage}/{fault}") from None


def _module(name: str) -> str:
    """The line that a parameter belongs to, named as `Optimizer.rates` would name all of it.

    "model/layers/self_attn/q_proj/bias" gives "model/layers/self_attn", "visual/blocks/norm1/weight"
    "visual/blocks/*norm*" and "visual/merger/mlp/0/weight" "visual/merger".
    """
    names = name.split("/")
    stack = next((i for i, part in enumerate(names) if part in STACKS), None)
    if stack is not None:
        return "/".join([*names[: stack + 1], "*norm*" if "norm" in names[stack + 1] else names[stack + 1]])
    behind = names[:-1] if names[-1] in ("weight", "bias") else names
    return "/".join(behind[: 3 if "vision_tower" in names else 2])


def _line(
    module: str, names: list[str], told: Mapping[str, str], shapes: Mapping[str, Any], by: Mapping[str, str]
) -> str:
    """What is told of the parameters of a module: of its largest first, then of what differs, by its name.

    Where something stands in for some of its weights (`by`), of these first, and not of biases.
    """
    depth = module.count("/") + (0 if module.endswith("*norm*") else 1)
    tail = lambda name: "/".join(name.split("/")[depth:]).removesuffix("/weight") or name.split("/")[-1]
    most = sorted(names, key=lambda name: (name not in by, -shapes[name].size))
    weights = [name for name in most if not (by and name.endswith("/bias"))]
    return _spread({tail(name): told[name] for name in weights})


def _spread(told: Mapping[str, str]) -> str:
    """{"q_proj": "1", "k_proj": "1", "v_proj": "frozen"} as "1; v_proj frozen"."""
    by_value: dict[str, list[str]] = {}
    for name, value in told.items():
        by_value.setdefault(value, []).append(name)
    first, *others = by_value.items() or [("", [])]
    more = lambda names: ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
    return "; ".join([first[0], *(f"{more(names)} {value}" for value, names in others)])


def _times(rate: float) -> str:
    return f"{rate:g}" if rate else "frozen"


def _flat(tree: Any) -> dict[str, Any]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
