"""What a compiled TPU program moves: collectives and HBM traffic, read from its HLO text with the turns of its loops.

The text is that of one device's program (`compiled.as_text()`). Only what the estimates need is parsed.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32, "u32": 32,
         "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128, "f8e4m3fn": 8, "f8e5m2": 8}
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_OP = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.*)")
_HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
# Ops without traffic of their own: names for values that exist, or the end of what another op began.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id", "iota",
         "while", "call", "conditional", "opt-barrier", "domain"}


class Collective(NamedTuple):
    """Executions of one collective in a program: the buffer gathered or reduced (bytes on a device), among which devices."""

    kind: str
    bytes: int
    group: tuple[int, ...]  # one of its groups: positions in the mesh's flat order
    count: int  # executions, loops included


class Traffic(NamedTuple):
    """What one device's program moves in a run: its collectives, and the bytes of HBM that its ops read and write."""

    collectives: list[Collective]
    hbm_bytes: int


class _Op(NamedTuple):
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    inside: str  # the text between the parentheses
    attributes: str


def _closing(text: str, start: int) -> int:
    """Position of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if not depth:
            return i
    return len(text) - 1


def _parse_op(line: str) -> _Op | None:
    match = _OP.match(line)
    if not match:
        return None
    name, rest = match.groups()
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    opcode = re.match(r"\s*([a-z][\w-]*)\(", rest[end:])
    if end <= 0 or not opcode:
        return None
    start = end + opcode.end() - 1
    close = _closing(rest, start)
    inside = rest[start + 1:close]
    return _Op(name, rest[:end], opcode[1], tuple(re.findall(r"%([\w.-]+)", inside)), inside, rest[close + 1:])


def parse(text: str) -> tuple[dict[str, dict[str, _Op]], str]:
    """Computations of an HLO module, {name: {op: ...}} in order, and the entry's name. Raises: ValueError if there is none."""
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if current is None:
            header = _HEADER.match(line)
            if header:
                current = computations[header[2]] = {}
                entry = header[2] if header[1] else entry
        elif line == "}":  # a kernel's backend_config has lines of its own, and braces in them
            current = None
        elif op := _parse_op(line):
            current[op.name] = op
    if entry is None:
        raise ValueError("not the text of an HLO module: it has no ENTRY computation")
    return computations, entry


def type_bytes(text: str, *, hbm_only: bool = False) -> int:
    """Bytes of an HLO type, tuples included; `hbm_only` leaves out what lies in on-chip memory (layout S(n))."""
    total = 0
    for dtype, dims, layout in _SHAPE.findall(text):
        if dtype in _BITS and not (hbm_only and "S(" in layout):
            total += math.prod(map(int, dims.split(","))) * _BITS[dtype] // 8 if dims else _BITS[dtype] // 8
    return total


def first_group(attributes: str, devices: int) -> tuple[int, ...]:
    """The first replica group of a collective, in any of HLO's spellings; no or empty groups mean all devices.

    Raises: ValueError for an unknown spelling.
    """
    def iota(dims, source, permutation):
        ids = np.arange(math.prod(dims)) if not source else np.arange(math.prod(source)).reshape(source)
        return (ids.transpose(permutation) if permutation else ids).reshape(dims)

    def integers(found):
        return [int(n) for n in found.split(",")] if found else []

    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes)
    if pairs:
        return int(pairs[1]), int(pairs[2])
    if not re.search(r"replica_groups=", attributes) or "replica_groups={}" in attributes:
        return tuple(range(devices))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return tuple(integers(listed[1]))
    if tiled := re.search(r"replica_groups=\[([\d,]+)\](?:<=\[([\d,]+)\](?:T\(([\d,]+)\))?)?", attributes):
        return tuple(int(i) for i in iota(*map(integers, tiled.groups())).reshape(-1, integers(tiled[1])[-1])[0])
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}",
                      attributes)
    if named:
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        order = iota([devices], integers(named[2]), integers(named[3])).reshape(tuple(axes.values()))
        used = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named[4])
        return _axes_group(order, list(axes), used)
    raise ValueError(f"unknown spelling of replica groups: {attributes[:200]}")


def _axes_group(order, names: list[str], used) -> tuple[int, ...]:
    """A group along mesh axes or parts of them, written 'axis' or 'axis':(product of the parts before)size."""
    index = []
    for axis, name in enumerate(names):
        parts = [(int(before or 1), int(size or order.shape[axis])) for found, before, size in used if found == name]
        steps = np.zeros(1, int)
        for before, size in parts:
            steps = (steps[:, None] + np.arange(size) * (order.shape[axis] // (before * size))).ravel()
        index.append(steps)
    return tuple(int(i) for i in order[np.ix_(*index)].ravel())


class _Program:
    """Walks a module; what a computation reads and writes is asked for again and again, so it is kept."""

    def __init__(self, text: str, devices: int):
        self.computations, self.entry = parse(text)
        self.devices = devices
        self.collectives: dict[tuple, int] = {}
        self.hbm_bytes = 0

    def callees(self, op: _Op) -> list[str]:
        names = re.findall(r"(?:calls|body|to_apply|branch_computations|(?:true|false)_computation)=\{?((?:%[\w.-]+(?:, )?)+)",
                           op.attributes)
        return [name for found in names for name in re.findall(r"%([\w.-]+)", found) if name in self.computations]

    def turns(self, loop: _Op) -> int:
        """Of a while loop that counts up from 0: the limit is the largest s32 constant of its condition."""
        condition = re.search(r"condition=%?([\w.-]+)", loop.attributes)[1]
        names, limits = [condition], []
        while names:
            for op in self.computations[names.pop()].values():
                if op.opcode == "constant" and op.type.startswith("s32[]"):
                    limits.append(int(op.inside))
                names += self.callees(op)
        return max(limits, default=1)

    def inside(self, name: str) -> Iterator[_Op]:
        """The ops of a computation and of the fusions in it."""
        for op in self.computations[name].values():
            yield op
            if op.opcode == "fusion":
                for callee in self.callees(op):
                    yield from self.inside(callee)

    def visit(self, name: str, times: int) -> None:
        computation = self.computations[name]
        for op in computation.values():
            if op.opcode == "while":
                body = re.search(r"body=%?([\w.-]+)", op.attributes)[1]
                self.visit(body, times * self.turns(op))
            elif op.opcode in ("call", "conditional", "async-start"):
                for callee in self.callees(op):
                    self.visit(callee, times)
            elif not self.collect(op, computation, times):
                for callee in self.callees(op) if op.opcode == "fusion" else ():
                    for part in self.inside(callee):
                        self.collect(part, None, times)
                self.hbm_bytes += times * self.traffic(op, computation)

    def collect(self, op: _Op, computation, times: int) -> bool:
        """Notes a collective; returns whether `op` is one."""
        kind = op.opcode.removesuffix("-start")
        attributes = op.attributes
        if op.opcode == "fusion" and "all-reduce-scatter" in attributes.partition("calls=")[2].split(",")[0]:
            kind = "reduce-scatter"  # the TPU compiler's fusion of an all-reduce with the slice that is kept
            attributes = next(part.attributes for callee in self.callees(op) for part in self.inside(callee)
                              if part.opcode.startswith("all-reduce"))
        if kind not in KINDS:
            return op.opcode.removesuffix("-done") in KINDS
        size = type_bytes(op.type)
        if computation is not None and (kind in ("reduce-scatter", "all-to-all") or op.opcode != kind):
            operands = sum(type_bytes(computation[name].type) for name in op.operands if name in computation)
            size = size - operands if op.opcode == "all-gather-start" else operands
        key = kind, size, first_group(attributes, self.devices)
        self.collectives[key] = self.collectives.get(key, 0) + times
        return True

    def traffic(self, op: _Op, computation) -> int:
        """Bytes of HBM that one execution of an op reads and writes."""
        if op.opcode in _FREE or op.opcode.endswith("-done"):
            return 0
        if op.opcode == "copy-start":
            return type_bytes(op.type, hbm_only=True)  # (destination, source, ...)
        if op.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * type_bytes(op.type, hbm_only=True)
        if op.opcode == "dynamic-update-slice":
            return 2 * type_bytes(computation[op.operands[1]].type, hbm_only=True)
        callees = self.callees(op) if op.opcode == "fusion" else []
        if callees:
            reads = sum(self.reads(callees[0], i) for i in range(len(op.operands)))
            return reads + self.writes(callees[0], op)
        operands = sum(type_bytes(computation[name].type, hbm_only=True) for name in op.operands if name in computation)
        return operands + type_bytes(op.type, hbm_only=True)

    def reads(self, name: str, index: int) -> int:
        """Bytes that a fusion reads of one operand: only the slice, if slices are all that it takes of it."""
        computation = self.computations[name]
        parameter = next(op for op in computation.values() if op.opcode == "parameter" and op.inside == str(index))
        whole = type_bytes(parameter.type, hbm_only=True)

        def used(value: str) -> int:
            total = 0
            for op in computation.values():
                if value not in op.operands:
                    continue
                if op.opcode in ("dynamic-slice", "slice", "gather") and op.operands[0] == value:
                    total += type_bytes(op.type)
                elif op.opcode == "bitcast":
                    total += used(op.name)
                elif op.opcode == "fusion" and self.callees(op):
                    fused = self.callees(op)[0]
                    total += sum(self.reads(fused, i) for i, operand in enumerate(op.operands) if operand == value)
                elif not (op.opcode == "dynamic-update-slice" and op.operands[0] == value):  # updated in place
                    return whole
            return total
        return min(whole, used(parameter.name)) if whole else 0

    def writes(self, name: str, fusion: _Op) -> int:
        """Bytes that a fusion writes: of a buffer updated in place only the update."""
        if not type_bytes(fusion.type, hbm_only=True):
            return 0
        computation = self.computations[name]

        def written(op: _Op) -> int:
            if op.opcode == "tuple":
                return sum(written(computation[operand]) for operand in op.operands)
            if op.opcode == "bitcast" and op.operands[0] in computation:
                return written(computation[op.operands[0]])
            if op.opcode == "dynamic-update-slice":
                return type_bytes(computation[op.operands[1]].type)
            if op.opcode == "fusion" and self.callees(op):
                return self.writes(self.callees(op)[0], op)
            return type_bytes(op.type)
        return min(type_bytes(fusion.type, hbm_only=True), written(next(reversed(computation.values()))))


def analyse(text: str, devices: int) -> Traffic:
    """Traffic of one run of a module on one of `devices` devices.

    A while loop's turns are the s32 constant of its condition (TPU programs carry no `known_trip_count`). Slices of stacked
    weights count as slices. TPU tiles pad small dimensions; that is not counted.
    """
    program = _Program(text, devices)
    program.visit(program.entry, 1)
    collectives = [Collective(*key, count) for key, count in program.collectives.items()]
    return Traffic(collectives, program.hbm_bytes)
