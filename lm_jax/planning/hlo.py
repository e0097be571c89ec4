"""Reads compiled programs as text: which collectives run, how often, and how many bytes they move.

A collective in a loop's body runs as often as the loop does. Where the compiler notes a loop's trips they are read,
elsewhere they follow from its condition; a loop whose trips depend on the data counts as one and is reported.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

_CONSTANT = r"^\((-?\d+)\)"  # the value, as the text has it
KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_BITS = {"pred": 8, "c64": 64, "c128": 128, "token": 0}  # of the types whose name does not say it


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    type: str
    opcode: str
    rest: str  # from the operands on

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest[: _closing(self.rest) + 1])

    def attribute(self, name: str) -> str | None:
        """The computation that an attribute such as `body` names."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found and found[1]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: one of KINDS.
      bytes: of the whole array of one run on one device: the result of an all-gather, the operand of the others.
      group: devices that take part together.
      runs: how often it runs.
      certain: False where a loop around it runs an unknown number of times, which `runs` counts as one.
      source: the operation that it belongs to, as the compiler notes it.
    """

    kind: str
    bytes: int
    group: int
    runs: int
    certain: bool
    source: str

    @property
    def wire_bytes(self) -> int:
        """Bytes that a device sends for all its runs, if rings carry them."""
        share = (self.group - 1) / self.group
        once = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return round(once * self.bytes * self.runs)


def collectives(text: str, num_devices: int) -> list[Collective]:
    """Every collective of a compiled program.

    Args:
      text: of `jax.stages.Compiled.as_text()`.
      num_devices: that the program runs on.
    """
    computations, entry = _parse(text)
    return list(_walk(entry, computations, num_devices, 1, True))


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", []
    for line in text.splitlines():
        if line.endswith("{") and (head := re.match(r"(ENTRY )?%?([\w.\-]+) .*->", line)):
            current = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)", line):
            rest = found[2]
            end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
            if opcode := re.match(r"\s*([\w\-]+)(?=\()", rest[end:]):
                current.append(Instruction(found[1], rest[:end], opcode[1], rest[end + opcode.end() :]))
    return computations, entry


def _closing(text: str) -> int:
    """Where the parenthesis that `text` begins with is closed."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.start()
    return len(text)


def _walk(name: str, computations, num_devices: int, runs: int, certain: bool) -> Iterator[Collective]:
    types = {i.name: i.type for i in computations[name]}
    fused: set[tuple[str, str]] = set()

    def inside(called: str | None, times: int = 1, known: bool = True) -> list[Collective]:
        known = known and certain
        if called is None or called not in computations:
            return []
        return list(_walk(called, computations, num_devices, runs * times, known))

    for instruction in computations[name]:
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            yield _collective(kind, instruction, types, num_devices, runs, certain)
        elif kind == "while":
            trips = _trips(instruction, computations[name], computations)
            yield from inside(instruction.attribute("body"), 1 if trips is None else trips, trips is not None)
        elif kind == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
            names = re.findall(r"%?([\w.\-]+)", branches[1]) if branches else []
            names += filter(None, map(instruction.attribute, ("true_computation", "false_computation")))
            # One of them runs: the one that moves most
            yield from max(map(inside, names), key=lambda found: sum(c.wire_bytes for c in found), default=[])
        elif kind == "fusion":
            # An asynchronous collective lies in all fusions that it runs beside, from its start to its end
            called = instruction.attribute("calls")
            channels = [_channel(i) for i in computations.get(called, ()) if i.opcode.removesuffix("-start") in KINDS]
            if not channels or not fused.issuperset(channels):
                yield from inside(called)
            fused.update(channels)
        elif kind in ("call", "async", "custom-call"):
            yield from inside(instruction.attribute("calls") or instruction.attribute("to_apply"))


def _collective(kind, instruction, types, num_devices, runs, certain) -> Collective:
    given = sum(num_bytes(types.get(operand, "")) for operand in instruction.operands)
    size = given
    if kind == "all-gather":  # the start of an asynchronous one returns its operands too
        size = num_bytes(instruction.type) - (given if instruction.opcode.endswith("-start") else 0)
    source = re.search(r'op_name="([^"]*)"', instruction.rest)
    group = _group_size(instruction.rest, num_devices)
    return Collective(kind, size, group, runs, certain, source[1] if source else instruction.name)


def _channel(instruction: Instruction) -> tuple[str, str]:
    found = re.search(r"channel_id=(\d+)", instruction.rest)
    return instruction.opcode, found[1] if found else instruction.name


def num_bytes(type_: str) -> int:
    """Bytes of an array, or of all arrays of a tuple: `(f32[2,3]{1,0}, s32[])` has 28."""
    total = 0
    for name, shape in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", type_):
        digits = re.match(r"[a-z]+(\d+)", name)
        bits = _BITS[name] if name in _BITS else int(digits[1]) if digits else 0
        total += -(-bits * math.prod(int(n) for n in shape.split(",") if n) // 8)
    return total


def _group_size(rest: str, num_devices: int) -> int:
    """Of `{{0,1},{2,3}}`, `[4,2]<=[8]` or `mesh['x'=4,'y'=2] {'y'}`; all devices where it says nothing."""
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        # Part of an axis is written as 'x':(before)size
        return math.prod(int(part or sizes[axis]) for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2]))
    return num_devices


def _trips(loop: Instruction, around: list[Instruction], computations) -> int | None:
    """How often a loop runs; None where the program alone does not say it."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(known[1])
    condition = computations.get(loop.attribute("condition"), [])
    if not condition or condition[-1].opcode != "compare" or "direction=LT" not in condition[-1].rest:
        return None
    by_name = {i.name: i for i in condition}
    counter, limit = (by_name.get(name) for name in condition[-1].operands)
    if counter is None or limit is None or counter.opcode != "get-tuple-element" or limit.opcode != "constant":
        return None
    start = _start(loop, _number(r"index=(\d+)", counter), {i.name: i for i in around})
    return max(_number(_CONSTANT, limit) - start, 0)  # scans count in steps of one


def _start(loop: Instruction, index: int, around: dict[str, Instruction]) -> int:
    """The counter's first value; a scan's is 0 where the text does not show it."""
    initial = around.get(loop.operands[0])
    if initial is not None and initial.opcode == "tuple" and index < len(initial.operands):
        value = around.get(initial.operands[index])
        while value is not None and value.opcode in ("copy", "bitcast") and value.operands:
            value = around.get(value.operands[0])
        if value is not None and value.opcode == "constant":
            return _number(_CONSTANT, value)
    return 0


def _number(pattern: str, instruction: Instruction) -> int:
    found = re.search(pattern, instruction.rest)
    if found is None:
        raise ValueError(f"no {pattern} in the instruction {instruction.name}{instruction.rest}")
    return int(found[1])
