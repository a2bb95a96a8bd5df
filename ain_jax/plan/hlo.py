"""What a compiled program does to memory and network, read from the text of its optimised HLO.

The compiler's own cost analysis counts the body of a loop once. Here each instruction counts as often as it runs: the
trip counts of the loops around it (`known_trip_count`) multiplied; a loop without one counts once and is named.
"""

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterator

import numpy as np

BITS = {"pred": 8, "token": 0, "opaque": 0, "s4": 4, "u4": 4, "c64": 64, "c128": 128}
# Over all 64 chips of a slice the TPU's compiler (libtpu 0.0.42) gathers by an all-reduce: each chip lays its part into
# zeros, and all are added up. It sends what an all-reduce sends, twice what a gather would. Over all of 8 and 16 chips,
# and over 64 out of 512, it was seen to gather what is large.
GATHER = "all-gather by all-reduce"
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
# Between slices nothing is a collective any more: a chip sends to its host and receives what the hosts made of it.
BETWEEN = {
    "ALL_REDUCE": "all-reduce",
    "ALL_GATHER": "all-gather",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}
# Instructions that move nothing themselves.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "after-all", "add-dependency"),
    *("domain", "while", "conditional", "call", "async-start", "async-update", "async-done", "partition-id"),
    *("replica-id", "opt-barrier", "optimization-barrier"),
}
HBM = ""  # the memory that a layout does not name; S(1) is on the chip's core, S(5) the host's

_SHAPE = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+)\s*(?:\(.*)?\{\s*$")


@dataclasses.dataclass(frozen=True)
class Array:
    """A shape in a type: bytes, and the memory it lies in."""

    bytes: float
    space: str


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]  # of its result
    operands: tuple[str, ...]
    line: str
    is_root: bool = False

    @functools.cached_property
    def calls(self) -> tuple[str, ...]:
        """The computations that it names."""
        named = re.findall(
            r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)", self.line
        )
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.line)
        return (*named, *(re.findall(r"%?([\w.\-]+)", branches[1]) if branches else ()))

    def bytes(self, space: str | None = None) -> float:
        """Bytes of the result, in one memory or in all."""
        return sum(a.bytes for a in self.arrays if space is None or a.space == space)


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind in a step, per chip."""

    kind: str
    count: float = 0.0  # how often one runs
    bytes: float = 0.0  # of the arrays
    wire: float = 0.0  # bytes that a chip sends by a ring: all-reduce twice, a share (g - 1) / g of g chips
    between_slices: bool = False


def arrays(text: str) -> tuple[Array, ...]:
    """The shapes in a type: "(bf16[2,4]{1,0:T(8,128)S(1)}, f32[])" is 16 bytes in memory 1 and 4 in HBM."""
    found = []
    for dtype, sizes, layout in _SHAPE.findall(text):
        match = re.search(r"\d+", dtype)
        bits = BITS.get(dtype, int(match[0]) if match else 0)
        count = math.prod(int(size.lstrip("<=")) for size in sizes.split(",") if size)
        space = re.search(r"S\((\d+)\)", layout or "")
        found.append(Array(count * bits / 8, space[1] if space else HBM))
    return tuple(found)


class Module:
    """The computations of a module's text, and how often each runs."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        self.unknown_loops: list[str] = []
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if found := _INSTRUCTION.match(line):
                instruction = _instruction(found[2], line[found.end() :], bool(found[1]))
                if instruction:
                    current[found[2]] = instruction
            elif (found := _HEAD.match(line)) and not line.startswith(" "):
                current = self.computations.setdefault(found[2], {})
                self.entry = found[2] if found[1] else self.entry
        if not self.entry:
            raise ValueError("no ENTRY computation: expected the text of an HLO module")

    @functools.cached_property
    def times(self) -> dict[str, float]:
        """How often each computation runs in one step; those inside fusions as often as the fusion."""
        times: dict[str, float] = defaultdict(float)

        def visit(name: str, count: float) -> None:
            times[name] += count
            for instruction in self.computations.get(name, {}).values():
                inner = count
                if instruction.opcode == "while":
                    trips = self._trips(instruction)
                    if not trips and instruction.name not in self.unknown_loops:
                        self.unknown_loops.append(instruction.name)
                    inner *= trips or 1
                for called in instruction.calls:
                    visit(called, inner)

        visit(self.entry, 1.0)
        return dict(times)

    def _trips(self, loop: Instruction) -> int:
        """How often a loop turns: as the compiler says, or the constant that its counter stays below; 0: unknown."""
        if known := re.search(r"known_trip_count\W+n\W+(\d+)", loop.line):
            return int(known[1])
        named = re.search(r"condition=%?([\w.\-]+)", loop.line)
        condition = self.computations.get(named[1], {}) if named else {}
        root = next((i for i in condition.values() if i.is_root), None)
        if root is None or root.opcode != "compare" or "direction=LT" not in root.line:
            return 0
        bound = condition.get(root.operands[1])
        number = re.search(r"constant\((\d+)\)", bound.line) if bound else None
        return int(number[1]) if number else 0

    def running(self) -> Iterator[tuple[str, float, Instruction]]:
        """(computation, how often it runs, instruction) of every instruction, those inside fusions too."""
        for name, count in self.times.items():
            for instruction in self.computations.get(name, {}).values():
                yield name, count, instruction

    @functools.cached_property
    def fused(self) -> set[str]:
        """The computations that are the inside of one instruction: what they hold stays on the chip's core."""
        plain = ("while", "conditional", "call")
        return {
            called
            for computation in self.computations.values()
            for instruction in computation.values()
            if instruction.opcode not in plain and not instruction.opcode.startswith("async")
            for called in instruction.calls
        }

    def collectives(self, chips_per_slice: int = 0) -> list[Collective]:
        """By kind and by whether they leave the slice, the most bytes first."""
        found: dict[tuple[str, bool], Collective] = {}
        seen: set[tuple[str, str]] = set()

        def add(kind: str, crosses: bool, count: float, size: float, wire: float) -> None:
            one = found.get((kind, crosses), Collective(kind, between_slices=crosses))
            found[kind, crosses] = dataclasses.replace(
                one, count=one.count + count, bytes=one.bytes + count * size, wire=one.wire + count * wire
            )

        for name, count, instruction in self.running():
            if instruction.opcode == "send" and (told := _between(instruction.line)):
                kind, slices = told
                sent = self.computations[name][instruction.operands[0]].bytes()
                whole = sent * slices if kind == "all-gather" else sent
                add(kind, True, count, whole, _wire(kind, whole, slices))
                continue
            kind = instruction.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            channel = re.search(r"channel_id=(\d+)", instruction.line)
            if channel and name in self.fused:
                # One that runs beside other work stands in each of the fusions that carry it on. Elsewhere each is one
                # of its own: those written by hand (`shard_map`) share channel 1.
                if (channel[1], kind) in seen:
                    continue
                seen.add((channel[1], kind))
            groups = _groups(instruction.line)
            size = max((len(g) for g in groups), default=0)
            operands = sum(
                self.computations[name][o].bytes() for o in instruction.operands if o in self.computations[name]
            )
            # A started one gives back its operands beside its results.
            results = instruction.bytes() - (operands if instruction.opcode != kind and kind != "all-reduce" else 0)
            largest = max(operands, results)
            if kind == "all-reduce" and self._gathers(name, instruction):
                kind = GATHER
            wire = _wire(kind, operands if kind == "collective-permute" else largest, size)
            crosses = bool(chips_per_slice) and any(len({d // chips_per_slice for d in g}) > 1 for g in groups)
            add(kind, crosses, count, largest, wire)
        return sorted(found.values(), key=lambda c: -c.wire)

    def _gathers(self, name: str, instruction: Instruction) -> bool:
        """Whether all that an all-reduce adds up are parts laid into zeros, each chip's at a place of its own."""
        return bool(instruction.operands) and all(self._is_laid(name, operand) for operand in instruction.operands)

    def _is_laid(self, name: str, operand: str) -> bool:
        here = self.computations[name]
        made = here.get(operand)
        while made is not None and made.opcode in ("copy", "bitcast", "copy-start", "copy-done") and made.operands:
            made = here.get(made.operands[0])
        if made is not None and made.opcode == "fusion":
            here = self.computations.get(made.calls[0], {})
            made = next((i for i in here.values() if i.is_root), None)
            while made is not None and made.opcode in ("copy", "bitcast") and made.operands:
                made = here.get(made.operands[0])
        return made is not None and made.opcode == "dynamic-update-slice"

    def hbm_bytes(self, multiplied: bool = True) -> float:
        """Bytes read from and written to HBM; with `multiplied` False each loop's body once, as the compiler counts.

        Every instruction outside fusions reads its operands and writes its result, where these lie in HBM. Of a slice
        or an update in place, inside a fusion too, only the part counts.
        """
        total = 0.0
        for name, count, instruction in self.running():
            if name in self.fused or instruction.opcode in FREE or instruction.opcode.endswith("-done"):
                continue
            total += (count if multiplied else 1.0) * self._moved(name, instruction)
        return total

    def _moved(self, name: str, instruction: Instruction) -> float:
        here = self.computations[name]
        operands = [here[o] for o in instruction.operands if o in here]
        kind, made = instruction.opcode, instruction.arrays
        if kind in ("dynamic-slice", "slice", "gather"):
            return sum(made[0].bytes for a in (*operands[0].arrays, *made) if a.space == HBM)
        if kind == "dynamic-update-slice":
            return 2 * operands[1].bytes(HBM)
        if kind in ("slice-start", "dynamic-slice-start"):  # gives back what is cut, and the piece
            return sum(made[1].bytes for a in made[:2] if a.space == HBM)
        if kind.endswith("-start"):
            return instruction.bytes(HBM)
        if kind == "custom-call" and "AllocateBuffer" in instruction.line:
            return 0.0
        inside = self.computations.get(instruction.calls[0], {}) if kind == "fusion" else {}
        parameters = {_number(i.line): i for i in inside.values() if i.opcode == "parameter"}
        total = 0.0
        for index, operand in enumerate(operands):
            size, parameter = operand.bytes(HBM), parameters.get(index)
            if size and parameter is not None:
                size = min(size, self._read(inside, parameter))
            total += size
        updates = [i for i in inside.values() if i.opcode == "dynamic-update-slice" and i.is_root]
        if updates:
            written = sum(inside[u.operands[1]].bytes() for u in updates if u.operands[1] in inside)
            return total + min(written, instruction.bytes(HBM))
        return total + instruction.bytes(HBM)

    @staticmethod
    def _read(inside: dict[str, Instruction], parameter: Instruction) -> float:
        """Bytes of a fusion's parameter that are read, where slices alone read it; else all."""
        names, read = {parameter.name}, 0.0
        for user in inside.values():  # in the order of use: a bitcast of the parameter comes before what reads it
            taken = names.intersection(user.operands)
            if not taken:
                continue
            if user.opcode in ("bitcast", "reshape", "copy") and len(inside[next(iter(taken))].arrays) == 1:
                names.add(user.name)
            elif user.opcode in ("dynamic-slice", "gather", "slice"):
                read += user.bytes()
            elif user.opcode == "dynamic-update-slice" and user.operands[0] in taken:
                continue  # updated in place
            else:
                return math.inf
        return read


def _instruction(name: str, rest: str, is_root: bool) -> Instruction | None:
    """The instruction of "TYPE opcode(operands), attributes"."""
    if rest.startswith("("):
        end = _closing(rest, 0) + 1
    else:
        end = rest.find(" ")
    call = re.match(r"\s*([\w\-]+)\(", rest[end:])
    if call is None:
        return None
    opens = end + call.end() - 1
    inner = rest[opens + 1 : _closing(rest, opens)]
    operands = tuple(re.findall(r"%([\w.\-]+)", inner))
    return Instruction(name, call[1], arrays(rest[:end]), operands, rest, is_root)


def _closing(text: str, start: int) -> int:
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    return len(text)


def _number(line: str) -> int:
    found = re.search(r"parameter\((\d+)\)", line)
    return int(found[1]) if found else -1


def _wire(kind: str, size: float, members: int) -> float:
    """Bytes that each of so many sends by a ring, of an array of `size` bytes."""
    if kind == "collective-permute":
        return size
    share = (members - 1) / members if members > 1 else 0.0
    return size * share * (2 if kind in ("all-reduce", GATHER) else 1)


def _between(line: str) -> tuple[str, int] | None:
    """Kind and number of slices of a transfer through the hosts; None for another one.

    _xla_megascale_transfer_type="ALL_REDUCE",_xla_megascale_target="{1,2}x{0:15}" is an all-reduce of two slices
    """
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', line)
    if kind is None:
        return None
    target = re.search(r'_xla_megascale_target="\{([^}]*)\}', line)
    named = re.findall(r"(\d+)(?::(\d+))?", target[1]) if target else []
    slices = sum(int(last or first) - int(first) + 1 for first, last in named)
    return BETWEEN.get(kind[1], kind[1].lower()), max(slices, 2)


def _groups(line: str) -> list[tuple[int, ...]]:
    """The groups of chips that a collective joins, of a permute its pairs.

    {{0,1},{2,3}}, [2,2]<=[4] and mesh['a'=2,'b'=2] {'b'} are the same two groups.
    """
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        return [tuple(map(int, p.split(","))) for p in re.findall(r"(\d+,\d+)", pairs[1])]
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", line):
        return [tuple(map(int, g.split(","))) for g in re.findall(r"\{([\d,]+)\}", listed[1])]
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        joined = re.findall(r"'([^']+)'", named[2])
        numbers = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        order = [i for i, n in enumerate(sizes) if n not in joined] + [list(sizes).index(n) for n in joined]
        size = math.prod(sizes[n] for n in joined)
        return [tuple(g) for g in numbers.transpose(order).reshape(-1, size).tolist()]
    if short := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, sizes, order = ([int(number) for number in s.split(",")] if s else [] for s in short.groups())
        numbers = np.arange(math.prod(sizes)).reshape(sizes)
        numbers = numbers.transpose(order) if order else numbers
        return [tuple(g) for g in numbers.reshape(-1, shape[-1]).tolist()]
    return []
