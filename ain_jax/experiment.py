"""An experiment file -> typed settings for each of its stages, and the same settings written out again.

A file holds gin bindings; `include` is relative to the file; a scope is the name of a stage:

    include "base.gin"
    steps = 300                        # a macro
    Optimizer.learning_rate = 3e-3     # for every stage
    pretrain/Trainer.steps = %steps    # for one stage

A setting that is itself a class, a part, is bound by its own name: `Similarity.neighbours = 8`, whoever holds one.

A stage may run more than once, under further names: with `Experiment.kinds = {"new_rows": "pretrain"}` the stage
new_rows does what pretrain does. It reads `pretrain/` bindings too, and its own `new_rows/` before them.

Only gin's parser is used. It yields (scope, selector, argument, value, line); the settings classes of
`ain_jax.stages` are filled from that here, so that names, scopes and types are checked before anything runs.
"""

import dataclasses
import difflib
import functools
import io
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gin import config_parser

EVERY_STAGE = ""


class ExperimentError(ValueError):
    """The experiment as written cannot run; the message says where, what was expected, and the nearest name."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What the run is, as opposed to how a stage does its work."""

    name: str
    stages: tuple[str, ...]
    seed: int = 0
    description: str = ""
    kinds: Mapping[str, str] = dataclasses.field(default_factory=dict)  # further stages: name -> the stage it is like

    def __post_init__(self):
        unused = sorted(set(self.kinds) - set(self.stages))
        if unused:
            raise ValueError(f"kinds names {unused[0]!r}, which stages does not hold: add it there, or leave it out")
        if self.name != Path(self.name).name or self.name in ("", ".."):
            raise ValueError(f"name = {self.name!r}: expected the name of a folder, which runs/ will hold")
        if not self.stages:
            raise ValueError("stages = (): expected one stage or more")

    def kind(self, stage: str) -> str:
        """The stage that this one is like: its own name, unless `kinds` has it."""
        return self.kinds.get(stage, stage)


@dataclasses.dataclass(frozen=True)
class Binding:
    """One line of an experiment file."""

    scope: str
    selector: str
    argument: str
    value: Any
    where: str

    @property
    def key(self) -> str:
        name = f"{self.selector}.{self.argument}" if self.argument else self.selector
        return f"{self.scope}/{name}" if self.scope else name


@dataclasses.dataclass(frozen=True)
class Macro:
    """A reference such as `%steps`, resolved after the last line has been read."""

    name: str


class _Delegate(config_parser.ParserDelegate):
    def configurable_reference(self, scoped_configurable_name, evaluate):
        raise ExperimentError(
            f"@{scoped_configurable_name}: references to functions are not used here; bind a value, or a macro "
            "written as %name"
        )

    def macro(self, macro_name):  # pyright: ignore[reportIncompatibleMethodOverride]
        return Macro(macro_name)


def nearest(name: str, known: Sequence[str]) -> str:
    """A clause that names the closest known name, or lists the known ones when none is close."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not close:
        by_lower = {k.lower(): k for k in known}
        close = [by_lower[m] for m in difflib.get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.5)]
    return f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(sorted(known))


def find_experiment(name: str, folder: Path) -> Path:
    """The file of an experiment given by name (`ain_tiny`) or by path (`my/experiment.gin`)."""
    as_path = Path(name)
    if as_path.suffix == ".gin" or len(as_path.parts) > 1:
        if as_path.is_file():
            return as_path
        hint = _beside(as_path) or f"give the path of a .gin file or a name in {folder}/"
        raise ExperimentError(f"no experiment file {name}: {hint}")
    path = folder / f"{name}.gin"
    if path.is_file():
        return path
    known = sorted(p.stem for p in folder.glob("*.gin") if p.stem != "base")
    if not known:
        raise ExperimentError(f"no experiment {name!r}: {folder}/ holds no .gin file")
    raise ExperimentError(f"no experiment {name!r} in {folder}/: {nearest(name, known)}")


def _beside(path: Path) -> str:
    """The experiment file nearest in name to one that is not there; nothing where its folder holds none."""
    known = sorted(p.name for p in path.parent.glob("*.gin"))
    return nearest(path.name, known) if known else ""


def read_bindings(path: Path, _including: tuple[Path, ...] = ()) -> list[Binding]:
    """The bindings of a file and of what it includes, in the order in which they take effect."""
    resolved = path.resolve()
    if resolved in _including:
        chain = " -> ".join(p.name for p in (*_including, resolved))
        raise ExperimentError(f"{path}: the files include one another: {chain}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ExperimentError(f"{path}: not UTF-8 text ({error})") from None
    except OSError as error:
        raise ExperimentError(f"{path}: cannot be read ({error.strerror or error})") from None
    bindings = []
    # As short as it can be said from here: what bound a value is written into every run's folder.
    shown = resolved.relative_to(Path.cwd()) if resolved.is_relative_to(Path.cwd()) else path
    for statement in _statements(text, str(shown)):
        where = f"{shown}:{statement.location.line_num}"
        if isinstance(statement, config_parser.IncludeStatement):
            included = path.parent / statement.filename
            if not included.is_file():
                hint = _beside(included)
                raise ExperimentError(
                    f"{where}: include {statement.filename!r}: no such file beside {path.name} ({included})"
                    + (f"; {hint}" if hint else "")
                )
            bindings += read_bindings(included, (*_including, resolved))
        elif isinstance(statement, config_parser.BindingStatement):
            bindings.append(_binding(statement, where))
        elif isinstance(statement, config_parser.ImportStatement):
            raise ExperimentError(f"{where}: import statements are not used here; the settings classes are built in")
    return bindings


def parse_override(text: str) -> Binding:
    """The binding of one `--set 'pretrain/Trainer.steps=20'`."""
    where = f"--set {text!r}"
    if "=" not in text:
        raise ExperimentError(f"{where}: expected [stage/]Class.name=value, for example pretrain/Trainer.steps=20")
    try:
        statements = list(_statements(text + "\n", where))
    except ExperimentError:
        key, value = text.split("=", 1)
        key, value = key.strip(), value.strip()
        raise ExperimentError(
            f'{where}: {value!r} is not a gin value; text is written in quotes: {key}="{value}"'
        ) from None
    if len(statements) != 1 or not isinstance(statements[0], config_parser.BindingStatement):
        raise ExperimentError(f"{where}: expected one binding, [stage/]Class.name=value")
    return _binding(statements[0], where)


def _binding(statement, where: str) -> Binding:
    """gin reads `a/b/Class.name`; a macro `name = 3` arrives as a selector without an argument."""
    return Binding(statement.scope or EVERY_STAGE, statement.selector, statement.arg_name or "", statement.value, where)


def _statements(text: str, where: str):
    stream = io.StringIO(text)
    try:
        parser = config_parser.ConfigParser(stream, _Delegate())
        yield from parser
    except ExperimentError as error:
        raise ExperimentError(f"{where}: {error}") from None
    except Exception as error:  # the parser raises SyntaxError, tokenize errors and ValueError alike
        line = getattr(error, "lineno", None)
        detail = " ".join(str(getattr(error, "msg", None) or error).split())
        raise ExperimentError(f"{where}{f':{line}' if line else ''}: not a gin statement: {detail}") from None


@dataclasses.dataclass(frozen=True)
class Resolved:
    """An experiment whose every setting is known: `settings[stage][class name]` is a frozen dataclass."""

    experiment: Experiment
    settings: Mapping[str, Mapping[str, Any]]
    origin: Mapping[str, str]  # "pretrain/Trainer.steps" -> the file and line (or --set) that bound it

    def stage(self, name: str) -> Mapping[str, Any]:
        return self.settings[name]

    def defaults(self, stage: str) -> list[str]:
        """The lines of `text` that a stage would have if nothing were bound, of the settings that have a default."""
        lines = []
        for value in self.settings[stage].values():
            for field in dataclasses.fields(value):
                made = field.default_factory
                default = field.default if made is dataclasses.MISSING else made()
                if default is not dataclasses.MISSING:
                    lines.append(f"{stage}/{type(value).__name__}.{field.name} = {_literal(default)}")
        return lines

    def text(self, origins: bool = True) -> str:
        """The operative configuration: every value in force, as a gin file that resolves to the same settings.

        With `origins`, a comment says which line bound a value.
        """
        lines = [f"# {self.experiment.name}: every value in force; a comment says which line bound it"]
        groups = [("", self.experiment)]
        for stage in self.experiment.stages:
            groups += [(f"{stage}/", value) for value in self.settings[stage].values()]
        for scope, value in groups:
            lines.append("")
            for field in dataclasses.fields(value):
                if dataclasses.is_dataclass(getattr(value, field.name)):
                    continue  # a part stands by itself
                key = f"{scope}{type(value).__name__}.{field.name}"
                origin = self.origin.get(key)
                comment = f"  # {origin}" if origin and origins else ""
                lines.append(f"{key} = {_literal(getattr(value, field.name))}{comment}")
        return "\n".join(lines) + "\n"


def _literal(value: Any) -> str:
    return repr(dict(value)) if isinstance(value, Mapping) else repr(value)


def resolve(
    bindings: Sequence[Binding], stages: Mapping[str, Sequence[type]], overrides: Sequence[Binding] = ()
) -> Resolved:
    """Typed settings from bindings. `stages` gives, for each known stage, the classes it reads.

    All faults are told at once. A later binding of the same key wins, so `overrides` win over the file; a binding
    with a scope wins over one without, wherever it stands. An override that changes nothing, because every stage
    has a binding of its own, is a fault, and so is a macro that nothing refers to.
    """
    faults: list[str] = []
    bindings = [*bindings, *overrides]
    macros = {b.selector: b.value for b in bindings if not b.argument}
    used = {name for b in bindings for name in _references(b.value)}
    stages = {
        name: tuple(dict.fromkeys(c for cls in group for c in _with_parts(cls))) for name, group in stages.items()
    }
    classes = {c.__name__: c for group in stages.values() for c in group} | {"Experiment": Experiment}
    for name, kind in _kinds(bindings, macros, faults).items():
        if name in stages:
            faults.append(f"Experiment.kinds: {name!r} is a stage of its own: give the further stage another name")
        elif kind not in stages:
            faults.append(f"Experiment.kinds: no stage {kind!r}: {nearest(kind, list(stages))}")
        elif name != Path(name).name or name in ("", ".."):
            faults.append(f"Experiment.kinds: {name!r} cannot name a folder: give the further stage another name")
        else:
            stages[name] = stages[kind]
    chosen: dict[tuple[str, str, str], Binding] = {}
    for binding in bindings:
        if not binding.argument:
            if binding.scope:
                faults.append(f"{binding.where}: the macro {binding.key!r} has a scope; a macro has none")
            continue
        fault = _name_fault(binding, classes, stages)
        if fault:
            faults.append(f"{binding.where}: {fault}")
            continue
        chosen[binding.scope, binding.selector, binding.argument] = binding
    for binding in bindings:  # of stages that do not run, too
        try:
            _expand(binding.value, macros)
        except ExperimentError as error:
            faults.append(f"{binding.where}: {error}")

    def fill(cls: type, scope: str, kind: str = EVERY_STAGE) -> Any:
        hints = typing.get_type_hints(cls)
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            if dataclasses.is_dataclass(hints[field.name]):
                part = fill(hints[field.name], scope, kind)
                if part is None:  # its fault is told
                    return None
                values[field.name] = part
                continue
            name = (cls.__name__, field.name)
            binding = chosen.get((scope, *name)) or chosen.get((kind, *name)) or chosen.get((EVERY_STAGE, *name))
            if binding is None:
                if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                    key = f"{scope}/{cls.__name__}" if scope else cls.__name__
                    faults.append(f"{key}.{field.name} is not bound, and it has no default: add the line to the file")
                continue
            try:
                values[field.name] = _typed(_expand(binding.value, macros), hints[field.name], binding.key)
                prefix = f"{scope}/" if scope else ""
                origin[f"{prefix}{cls.__name__}.{field.name}"] = binding.where
            except ExperimentError as error:
                faults.append(f"{binding.where}: {error}")
        required = [
            f.name
            for f in dataclasses.fields(cls)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        if any(name not in values for name in required):
            return None
        try:
            return cls(**values)
        except ValueError as error:  # a settings class may refuse values that do not go together
            faults.append(f"{scope + '/' if scope else ''}{cls.__name__}: {error}")
            return None

    origin: dict[str, str] = {}
    experiment = fill(Experiment, EVERY_STAGE)
    settings: dict[str, dict[str, Any]] = {}
    if experiment is not None:
        repeated = {s for s in experiment.stages if experiment.stages.count(s) > 1}
        for stage in sorted(repeated):
            faults.append(f"Experiment.stages names {stage!r} more than once")
        for stage in experiment.stages:
            if stage not in stages:
                faults.append(f"Experiment.stages: no stage {stage!r}: {nearest(stage, list(stages))}")
                continue
            kind = experiment.kind(stage)
            settings[stage] = {cls.__name__: fill(cls, stage, kind) for cls in stages[stage]}
    in_force = set(origin.values())
    for binding in overrides:
        latest = chosen.get((binding.scope, binding.selector, binding.argument)) is binding
        if latest and not faults and binding.where not in in_force:
            own = sorted(k for k in origin if k.endswith(f"/{binding.selector}.{binding.argument}"))
            faults.append(
                f"{binding.where} changes nothing: "
                + (
                    f"bound by stage as {', '.join(own)}; name the stage"
                    if own
                    else f"no stage of {experiment.name if experiment else 'this experiment'} reads it"
                )
            )
    names = {b.selector: b.where for b in bindings if not b.argument and not b.scope}
    for name in sorted(set(names) - used) if not faults else ():
        known = [f"{c}.{f.name}" for c, cls in classes.items() for f in dataclasses.fields(cls)]
        hint = f"; {nearest(name, sorted(used))}" if used else f"; a setting is written as {known[0]}"
        faults.append(f"{names[name]}: nothing refers to the macro {name!r}{hint}")
    if faults:
        raise ExperimentError("\n".join(dict.fromkeys(faults)))
    assert experiment is not None, "an experiment without faults has its settings"
    return Resolved(experiment, settings, origin)


def _with_parts(cls: type) -> list[type]:
    """The class and those of its settings that are classes, theirs included."""
    parts = [part for part in typing.get_type_hints(cls).values() if dataclasses.is_dataclass(part)]
    return [cls, *(found for part in parts if isinstance(part, type) for found in _with_parts(part))]


def _kinds(bindings: Sequence[Binding], macros: Mapping[str, Any], faults: list[str]) -> Mapping[str, str]:
    """What `Experiment.kinds` is bound to, needed before the names of stages are checked."""
    bound = [b for b in bindings if (b.scope, b.selector, b.argument) == (EVERY_STAGE, "Experiment", "kinds")]
    try:
        return _typed(_expand(bound[-1].value, macros), Mapping[str, str], bound[-1].key) if bound else {}
    except ExperimentError as error:
        faults.append(f"{bound[-1].where}: {error}")
        return {}


def _name_fault(binding: Binding, classes: Mapping[str, type], stages: Mapping[str, Sequence[type]]) -> str | None:
    if binding.scope and binding.scope not in stages:
        return f"no stage {binding.scope!r} in {binding.key!r}: {nearest(binding.scope, list(stages))}"
    if binding.selector not in classes:
        return f"no settings class {binding.selector!r} in {binding.key!r}: {nearest(binding.selector, list(classes))}"
    names = [f.name for f in dataclasses.fields(classes[binding.selector])]
    part = typing.get_type_hints(classes[binding.selector]).get(binding.argument)
    if dataclasses.is_dataclass(part) and isinstance(part, type):
        return f"{binding.key} is a part with settings of its own: bind {part.__name__}.NAME instead"
    if binding.argument not in names:
        return f"{binding.selector} has no setting {binding.argument!r}: {nearest(binding.argument, names)}"
    if binding.scope:
        readers = [s for s, group in stages.items() if classes[binding.selector] in group]
        if binding.scope not in readers:
            where = ", ".join(readers) if readers else "no stage; write it without a scope"
            return f"stage {binding.scope!r} does not read {binding.selector} (read by: {where})"
    return None


def _references(value: Any) -> Iterator[str]:
    """The names of the macros that a value refers to."""
    if isinstance(value, Macro):
        yield value.name
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _references(item)
    elif isinstance(value, dict):
        for item in (*value.keys(), *value.values()):
            yield from _references(item)


def _expand(value: Any, macros: Mapping[str, Any], _seen: tuple[str, ...] = ()) -> Any:
    """The value with each %macro replaced, inside lists, tuples and dicts too."""
    if isinstance(value, Macro):
        if value.name in _seen:
            raise ExperimentError(f"the macro %{value.name} refers to itself")
        if value.name not in macros:
            hint = nearest(value.name, list(macros)) if macros else "none is set"
            raise ExperimentError(f"no macro %{value.name}: {hint}")
        return _expand(macros[value.name], macros, (*_seen, value.name))
    expand = functools.partial(_expand, macros=macros, _seen=_seen)
    if isinstance(value, (list, tuple)):
        return type(value)(expand(v) for v in value)
    if isinstance(value, dict):
        return {expand(k): expand(v) for k, v in value.items()}
    return value


def _typed(value: Any, wanted: Any, key: str) -> Any:
    """The value as the declared type; an int may stand for a float and a list for a tuple, nothing else."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    refusal = ExperimentError(f"{key} = {value!r}: expected {_type_name(wanted)}, found {type(value).__name__}")
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            try:
                return _typed(value, option, key)
            except ExperimentError:
                continue
        raise refusal
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise ExperimentError(f"{key} = {value!r}: {nearest(str(value), [str(a) for a in arguments])}")
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise refusal
        items = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(items) != len(value):
            raise refusal
        return tuple(_typed(v, t, f"{key}[{i}]") for i, (v, t) in enumerate(zip(value, items, strict=True)))
    if origin in (dict, Mapping) or wanted is dict:
        if not isinstance(value, dict):
            raise refusal
        if not arguments:
            return value
        return {_typed(k, arguments[0], key): _typed(v, arguments[1], f"{key}[{k!r}]") for k, v in value.items()}
    if wanted is type(None):
        if value is None:
            return None
        raise refusal
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if (wanted is int and isinstance(value, bool)) or not isinstance(value, wanted):
        raise refusal
    return value


def _type_name(wanted: Any) -> str:
    if typing.get_args(wanted):
        return str(wanted).replace("typing.", "").replace("collections.abc.", "")
    return getattr(wanted, "__name__", str(wanted))
