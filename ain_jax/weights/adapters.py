"""Adapters <-> a folder that PEFT opens: adapter_config.json, adapter_model.safetensors and our adapter_base.json.

PEFT keeps two matrices of each module, lora_A (rank, inputs) and lora_B (outputs, rank), and of a table read by id
lora_embedding_A (rank, rows) and lora_embedding_B (width, rank). Their layouts follow from those of the weight table:

    "(N H) D -> D N H"   gives   "rank D -> D rank"   and   "(N H) rank -> rank N H"

With DoRA a third stands beside, lora_magnitude_vector (outputs,): "(N H) -> N H".
"""

import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from ain_jax.models.config import ModelConfig
from ain_jax.models.lora import ALL_LINEAR, EMBEDDING, HEAD, Lora, Site, magnitudes, pairs, sites
from ain_jax.weights.export import replace_folder, write_json
from ain_jax.weights.shards import Stored, header, read_json
from ain_jax.weights.table import canonical, published, rearrange, sizes

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "adapter_base.json"
PREFIX = "base_model.model."
NAME = re.compile(
    re.escape(PREFIX)
    + r"(?P<module>.+)\.(lora_(?P<linear>[AB])\.weight|lora_embedding_(?P<table>[AB])|(?P<copy>base_layer)\.weight"
    + r"|lora_(?P<magnitude>magnitude_vector))"
)
# The canonical beginnings of names in a model with an image encoder, and what transformers has there today.
TODAY = (
    ("model.", "model.language_model."),
    ("visual.", "model.visual."),
    ("vision_tower.vision_model.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)
# All that we read of adapter_config.json: what PEFT assumes where it is silent, and of what kind it must be.
READ: dict[str, tuple[Any, tuple[type, ...]]] = {
    "r": (8, (int,)),
    "lora_alpha": (8, (int, float)),
    "use_rslora": (False, (bool,)),
    "use_dora": (False, (bool,)),
    "rank_pattern": ({}, (dict,)),
    "alpha_pattern": ({}, (dict,)),
    "target_modules": (None, (list, str)),
    "exclude_modules": ([], (list, str)),
    "ensure_weight_tying": (False, (bool,)),
}
PATTERNS = (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
# Attributes of which we do some values. The other ways to draw the first weights change those of the base as well.
ONLY = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
# Attributes that change no number of the forward pass; dropout counts in training alone.
SILENT = {
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "peft_version", "inference_mode"),
    *("lora_dropout", "eva_config", "megatron_core", "qalora_group_size", "runtime_config"),
}


def save_adapters(
    adapters: Mapping[str, Any],
    settings: Lora,
    config: ModelConfig,
    folder: str | Path,
    base: str = "",
    tokenizer: str = "",
) -> Path:
    """The folder, complete, as PEFT on a transformers of today opens it over the model called `base`.

    A file beside, which PEFT leaves alone, keeps what `load_adapters` asks for: how many rows the vocabulary of the
    base has and, where given, its tokenizer's fingerprint. An adapted embedding of a tied model is written for the head
    as well, turned, because PEFT adapts each of the two by itself.
    """
    folder, letters, known = Path(folder), sizes(config), sites(config)
    lengths = magnitudes(adapters)
    held = {
        path: tuple(map(np.asarray, (a, b, lengths[path]) if path in lengths else (a, b)))
        for path, a, b in pairs(adapters)
    }
    faults = [] if held else ["there is no pair to save"]
    for path, (a, b, *magnitude) in held.items():
        if path not in known:
            faults.append(f"{path} is no matrix of this model")
            continue
        if (a.shape, b.shape) != (expected := known[path].shapes(settings.rank_of(path), letters)):
            faults.append(f"{path}: a {a.shape} and b {b.shape}, expected {expected[0]} and {expected[1]}")
        expected = [known[path].magnitude(letters)] if settings.dora else []
        if [m.shape for m in magnitude] != expected:
            faults.append(f"{path}: magnitudes {[m.shape for m in magnitude]}, expected {expected}")
        if settings.dora and known[path].is_table and config.text.tied:
            faults.append(f"{path}: the head is tied to it, and PEFT has a magnitude for each of the two")
    _stop(folder, faults)

    tensors: dict[str, np.ndarray] = {}
    modules: dict[str, str] = {}  # as transformers names them today -> our path
    for place in published(config):
        path = place.path.removesuffix("/weight")
        if path not in held:
            continue
        module = _today(canonical(place.name).removesuffix(".weight"), config)
        modules[module] = path
        names = [PREFIX + module + half for half in _halves(known[path], settings.dora)]
        for name_in_file, array, layout in zip(names, held[path], _layouts(known[path], settings.dora), strict=True):
            one = array if place.layer is None else array[place.layer]
            turned = rearrange(one, layout, letters | {"rank": settings.rank_of(path)}, reverse=True)
            tensors[name_in_file] = np.ascontiguousarray(turned)
        if known[path].is_table and config.text.tied:
            modules[HEAD] = path
            a, b = (tensors[name_in_file] for name_in_file in names)
            tensors |= {PREFIX + HEAD + ".lora_A.weight": np.ascontiguousarray(b.T)}
            tensors |= {PREFIX + HEAD + ".lora_B.weight": np.ascontiguousarray(a.T)}

    attributes = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": _whole(settings.alpha),
        "use_rslora": settings.rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": settings.dora,
        "modules_to_save": None,
        "target_modules": _ends(modules, _modules(config)),
        "rank_pattern": _pattern({m: settings.rank_of(p) for m, p in modules.items()}, settings.rank, config),
        "alpha_pattern": _pattern(
            {m: _whole(settings.alpha_of(p)) for m, p in modules.items()}, _whole(settings.alpha), config
        ),
        # PEFT then keeps the two adapters of a tied embedding one.
        "ensure_weight_tying": HEAD in modules and config.text.tied,
    }
    record = {"vocabulary_rows": config.text.vocabulary} | ({"tokenizer": tokenizer} if tokenizer else {})
    beside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        save_file(tensors, beside / WEIGHTS, metadata={"format": "pt"})
        write_json(beside / CONFIG, attributes)
        write_json(beside / BASE, record)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    replace_folder(beside, folder)
    return folder


def load_adapters(
    folder: str | Path, config: ModelConfig, params: Mapping[str, Any] | None = None, tokenizer: str = ""
) -> tuple[dict[str, Any], Lora]:
    """(adapters, settings) of a PEFT folder: numpy arrays as stored, and the targets by the shortest names that fit.

    Raises one ValueError that lists every attribute and tensor that we have no place for, every one that is missing or
    of the wrong shape, and a base of another vocabulary; a folder made elsewhere does not tell its vocabulary, and is
    refused only where it adapts the embedding or the head. PEFT adds a copy of an adapted embedding: `params`, the
    parameters of the base, are compared with it, and without them it is refused, since PEFT would load it.
    """
    folder = Path(folder)
    attributes, faults = _attributes(folder)
    faults += _other_base(folder, config, tokenizer)
    reader = _Reader(config, attributes)
    tensors = _stored(folder)
    for name, tensor in tensors.items():
        reader.place(name, tensor.shape)
    faults += reader.faults + reader.missing()
    _stop(folder, faults)

    flat: dict[str, np.ndarray] = {}
    for path in reader.paths():
        site, letters = reader.sites[path], reader.letters | {"rank": reader.ranks[path]}
        modules = [module for module, own in reader.places.items() if own == path]
        for i, (half, layout) in enumerate(zip(reader.halves, _layouts(site, reader.dora), strict=True)):
            arrays = [rearrange(tensors[reader.names[m][i]].read(), layout, letters) for m in modules]
            flat[f"{path}/{half}"] = np.ascontiguousarray(arrays[0]) if site.layers is None else np.stack(arrays)
    faults += [*_tied_faults(tensors, reader), *_copy_faults(tensors, reader, params)]
    _stop(folder, faults)
    return unflatten_dict(flat, sep="/"), reader.settings()


class _Reader:
    """The names of a file, each put in its place; what does not fit gathers in `faults`."""

    def __init__(self, config: ModelConfig, attributes: Mapping[str, Any]):
        self.config, self.attributes = config, attributes
        self.dora: bool = attributes["use_dora"]
        self.halves = ("a", "b", "magnitude") if self.dora else ("a", "b")
        self.sites, self.letters = sites(config), sizes(config)
        weights = [(canonical(place.name), place.path) for place in published(config)]
        paths = {name.removesuffix(".weight"): path.removesuffix("/weight") for name, path in weights}
        # Module, by its canonical name, -> our path, in the order of the table.
        self.places = {module: path for module, path in paths.items() if path in self.sites}
        self.faults: list[str] = []
        self.names: dict[str, list[str]] = {}  # module -> its tensors A and B, and its magnitude
        self.spelt: dict[str, str] = {}  # module -> as the file spells it
        self.ranks: dict[str, int] = {}  # by our path
        self.alphas: dict[str, float] = {}
        self.copies: dict[str, str] = {}  # module -> the copy of its base
        self.head: list[str] = ["", ""]  # the tensors A and B of a tied head

    def place(self, name: str, shape: tuple[int, ...]) -> None:
        """Finds the place of one tensor."""
        match = NAME.fullmatch(name)
        spelt = match["module"] if match else ""
        module = canonical(spelt + ".weight").removesuffix(".weight")
        path = self.places.get(module, "")
        site = self.sites.get(path)
        tied_head = module == HEAD and self.config.text.tied
        if match and match["copy"] and (tied_head or (site and path.split("/")[-1] in (EMBEDDING, HEAD))):
            self.copies[module] = name
            return
        half = (match["table" if site and site.is_table else "linear"] if match else None) or ""
        which = "AB".index(half) if half else 2  # the magnitude
        if not (half or (match and match["magnitude"] and self.dora and site)) or not (site or tied_head):
            self.faults.append(f"{WEIGHTS}: {name} {shape} has no place in this model's adapters")
            return
        if tied_head:
            self.head[which] = name
            return
        assert site is not None
        rank, alpha = (self._of(spelt, pattern, whole) for pattern, whole in PATTERNS)
        for what, value, known in (("rank", rank, self.ranks), ("alpha", alpha, self.alphas)):
            if known.setdefault(path, value) != value:
                self.faults.append(f"{CONFIG}: {spelt} has {what} {value}, expected {known[path]} as in other layers")
        names = self.names.setdefault(module, [""] * len(self.halves))
        if names[which]:
            self.faults.append(f"{WEIGHTS}: {module} is given twice: {names[which]}, {name}")
        names[which], self.spelt[module] = name, spelt
        expected = _their_shapes(site, rank, self.letters, self.dora)[which]
        if shape != expected:
            self.faults.append(f"{WEIGHTS}: {name} has shape {shape}, expected {expected} at rank {rank}")

    def missing(self) -> list[str]:
        """Tensors that the others or `target_modules` call for, and those that it does not name."""
        faults = []
        started = {self.places[module] for module in self.names}
        tied, tying = self.config.text.tied, self.attributes["ensure_weight_tying"]
        # Patterns were made for the names of one version of transformers.
        differing = {m: spelt for m, spelt in self.spelt.items() if m != _today(m, self.config)}
        older = bool(differing) and all(module == spelt for module, spelt in differing.items())
        for module, path in self.places.items():
            site, names = self.sites[path], self.names.get(module, [""] * len(self.halves))
            spelt = self.spelt.get(module, module if older else _today(module, self.config))
            named = self._targets(spelt, site) or (tied and tying and site.is_table and self._targets(HEAD, site))
            if named or path in started:
                faults += [
                    f"{WEIGHTS}: {PREFIX}{spelt}{half} is missing, expected {shape}"
                    for half, name, shape in zip(
                        _halves(site, self.dora),
                        names,
                        _their_shapes(site, self._rank(path), self.letters, self.dora),
                        strict=True,
                    )
                    if not name
                ]
            if any(names) and not named:
                targets = self.attributes["target_modules"]
                faults.append(f"{CONFIG}: target_modules={targets!r} leaves out {spelt}, which {WEIGHTS} holds")
        embedding = next(path for path, site in self.sites.items() if site.is_table)
        if tied and embedding in started and not all(self.head) and not tying:
            faults.append(
                f"{CONFIG}: ensure_weight_tying=False, expected True: the embedding is adapted and the head is tied to "
                "it, but PEFT left the head as it was and here it is the adapted embedding; untie the base first"
            )
        if tied and embedding in started:
            own = [self._of(HEAD, pattern, whole) for pattern, whole in PATTERNS]
            expected = [self.ranks[embedding], self.alphas[embedding]]
            if own != expected:
                faults.append(f"{CONFIG}: {HEAD} has rank and alpha {own}, expected {expected}, the embedding's own")
        if tied and embedding in started and self.dora:
            faults.append(
                f"{CONFIG}: use_dora=True adapts {EMBEDDING}, to which this model's head is tied, and PEFT gives each "
                "of the two a magnitude of its own; untie the base first"
            )
        if tied and any(self.head) and embedding not in started:
            faults.append(f"{WEIGHTS}: {HEAD} is adapted, expected {EMBEDDING}, to which this model's head is tied")
        return faults

    def paths(self) -> list[str]:
        """Our paths of the adapted modules, in the order of the table."""
        return list(dict.fromkeys(path for module, path in self.places.items() if module in self.names))

    def settings(self) -> Lora:
        """The settings of ours that say the same."""
        rank, alpha = self.attributes["r"], float(self.attributes["lora_alpha"])
        chosen = self.paths()
        modules = _and_parents([place.path.rpartition("/")[0] for place in published(self.config)], "/")

        def pattern(values: Mapping[str, Any], whole: Any) -> dict[str, Any]:
            others = {path: value for path, value in values.items() if value != whole}
            return {
                end: value
                for value in dict.fromkeys(others.values())
                for end in _ends([path for path in chosen if others.get(path) == value], modules, "/")
            }

        return Lora(
            rank=rank,
            alpha=alpha,
            targets=tuple(_ends(chosen, modules, "/")),
            rslora=self.attributes["use_rslora"],
            rank_pattern=pattern(self.ranks, rank),
            alpha_pattern=pattern({path: float(value) for path, value in self.alphas.items()}, alpha),
            dora=self.dora,
        )

    def _rank(self, path: str) -> int:
        return self.ranks[path] if path in self.ranks else self.attributes["r"]

    def _of(self, spelt: str, pattern: str, whole: str) -> Any:
        """The module's own value: PEFT takes the first key that is a pattern of the end of its name."""
        for key, value in self.attributes[pattern].items():
            if re.match(rf"(.*\.)?({key})$", spelt):
                return value
        return self.attributes[whole]

    def _targets(self, spelt: str, site: Site) -> bool:
        """Whether PEFT adapts the module."""
        targets, excluded = self.attributes["target_modules"], self.attributes["exclude_modules"]
        linear = isinstance(targets, str) and targets.lower() == ALL_LINEAR and not site.is_table and spelt != HEAD
        return (linear or _matches(targets, spelt)) and not _matches(excluded, spelt)


def _attributes(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The attributes that we read, and the faults of all."""
    if not (folder / CONFIG).exists():
        raise ValueError(f"{folder / CONFIG} is missing; expected a folder as PEFT saves it")
    given = {"peft_type": None} | read_json(folder / CONFIG)
    faults, wrong = [], []
    for name, value in given.items():
        if name in ONLY:
            if value not in ONLY[name]:
                faults.append(f"{CONFIG}: {name}={value!r}, expected {' or '.join(map(repr, ONLY[name]))}")
        # Each release of PEFT adds attributes, which are off where they are null, false or empty.
        elif name not in READ and name not in SILENT and not (value is None or value is False or value in ("", [], {})):
            faults.append(
                f"{CONFIG}: {name}={value!r} is not handled; merge the adapter with PEFT and load the whole model"
            )
    attributes: dict[str, Any] = {name: given[name] if given.get(name) is not None else READ[name][0] for name in READ}
    for name, value in attributes.items():
        if type(value) not in READ[name][1]:
            wrong.append(f"{CONFIG}: {name}={value!r}; expected {' or '.join(k.__name__ for k in READ[name][1])}")
    for pattern, whole in PATTERNS if not wrong else ():
        for name, value in ((whole, attributes[whole]), *attributes[pattern].items()):
            if type(value) not in READ[whole][1] or value <= 0:
                wrong.append(f"{CONFIG}: {name}={value!r}; expected a number above 0")
    _stop(folder, faults + wrong if wrong else [])  # by such values nothing can be read
    return attributes, faults


def _stored(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder."""
    path = folder / WEIGHTS
    if not path.exists():
        found = ", ".join(sorted(p.name for p in folder.iterdir()))
        raise ValueError(f"{path} is missing; expected a folder as PEFT saves it with safetensors, found {found}")
    return {tensor.name: tensor for tensor in header(path)}


def _other_base(folder: Path, config: ModelConfig, tokenizer: str) -> list[str]:
    """What the record beside, where there is one, says of another base than this."""
    record = read_json(folder / BASE) if (folder / BASE).exists() else {}
    faults = []
    rows, fingerprint = record.get("vocabulary_rows"), record.get("tokenizer")
    if rows is not None and rows != config.text.vocabulary:
        faults.append(f"{BASE}: vocabulary_rows={rows!r}, expected {config.text.vocabulary}, those of this model")
    if tokenizer and fingerprint is not None and fingerprint != tokenizer:
        faults.append(f"{BASE}: tokenizer={fingerprint!r}, expected {tokenizer!r}")
    return faults


def _tied_faults(tensors: Mapping[str, Stored], reader: _Reader) -> list[str]:
    """The adapter of a tied head must be that of the embedding, turned."""
    if not any(reader.head):
        return []
    module = next(module for module, path in reader.places.items() if reader.sites[path].is_table)
    # The head's A reads what the table's B writes.
    pairs_of_names = zip(reader.head, reader.names[module][::-1], strict=True)
    return [
        f"{WEIGHTS}: {head or 'a half of ' + HEAD} is not {table} turned, but config.json says tie_word_embeddings"
        for head, table in pairs_of_names
        if not head or not np.array_equal(tensors[head].read(), tensors[table].read().T)
    ]


def _copy_faults(tensors: Mapping[str, Stored], reader: _Reader, params: Mapping[str, Any] | None) -> list[str]:
    """A copy of a base weight must be the base's own."""
    faults = []
    for module, name in reader.copies.items():
        own = module if module in reader.places else next(m for m in reader.places if m.endswith(EMBEDDING))
        path = reader.places[own]
        if params is None:
            faults.append(f"{WEIGHTS}: {name} is a copy of the base's weight; expected params, to compare it with")
            continue
        ours = flatten_dict(dict(params), sep="/")[f"{path}/weight"]
        copy = tensors[name].read()
        if not np.array_equal(copy, np.asarray(ours).astype(copy.dtype)):
            faults.append(f"{WEIGHTS}: {name} differs from {path}/weight, expected the weight of the base")
    return faults


def _layouts(site: Site, dora: bool) -> list[str]:
    """The layouts of A and B, theirs to ours, and of the magnitude."""
    inputs, outputs = " ".join(site.inputs), " ".join(site.outputs)
    magnitude = [f"({outputs}) -> {outputs}"] if dora else []
    return [f"rank ({inputs}) -> {inputs} rank", f"({outputs}) rank -> rank {outputs}", *magnitude]


def _their_shapes(site: Site, rank: int, letters: Mapping[str, int], dora: bool) -> list[tuple[int, ...]]:
    inputs, outputs = (int(np.prod([letters[letter] for letter in side])) for side in (site.inputs, site.outputs))
    return [(rank, inputs), (outputs, rank), *([(outputs,)] if dora else [])]


def _halves(site: Site, dora: bool) -> list[str]:
    magnitude = [".lora_magnitude_vector"] if dora else []
    if site.is_table:
        return [".lora_embedding_A", ".lora_embedding_B", *magnitude]
    return [".lora_A.weight", ".lora_B.weight", *magnitude]


def _today(module: str, config: ModelConfig) -> str:
    """A module's canonical name as PEFT finds it in the model of transformers."""
    for ours, theirs in TODAY if config.vision else ():
        if module.startswith(ours):
            return theirs + module.removeprefix(ours)
    return module


def _modules(config: ModelConfig) -> list[str]:
    """Today's names of the modules of the model and of what contains them, since PEFT searches all of these."""
    modules = [canonical(place.name).rpartition(".")[0] for place in published(config)] + [HEAD]
    return _and_parents([_today(module, config) for module in modules], ".")


def _and_parents(names: Iterable[str], mark: str) -> list[str]:
    """The names and all that they lie in."""
    return [mark.join(parts[:end]) for parts in (n.split(mark) for n in names) for end in range(1, len(parts) + 1)]


def _ends(chosen: Iterable[str], names: Iterable[str], mark: str = ".") -> list[str]:
    """The shortest ends, a bare number apart, of the chosen names that no other name ends in.

    {"a.0.q", "a.1.q", "a.0.k"} among these and "a.1.k" gives ["q", "0.k"].
    """
    carriers: dict[str, set[str]] = defaultdict(set)
    ends = lambda name: [name.split(mark, cut)[-1] for cut in range(name.count(mark), -1, -1)]
    for name in names:
        for end in ends(name):
            carriers[end].add(name)
    found, wanted = {}, set(chosen)
    for name in chosen:
        found[next(end for end in ends(name) if carriers[end] <= wanted and not end.isdigit())] = None
    return list(found)


def _pattern(values: Mapping[str, Any], whole: Any, config: ModelConfig) -> dict[str, Any]:
    """Those of the modules' own values that differ, by the ends of names."""
    others = [value for value in dict.fromkeys(values.values()) if value != whole]
    return {
        end: value for value in others for end in _ends([m for m, v in values.items() if v == value], _modules(config))
    }


def _matches(targets: str | list[str] | None, module: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith("." + target) for target in targets or ())


def _whole(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value


def _stop(folder: Path, faults: list[str]) -> None:
    if faults:
        raise ValueError(f"{folder}: {len(faults)} faults:\n  " + "\n  ".join(dict.fromkeys(faults)))
