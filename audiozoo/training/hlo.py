r"""What a compiled program costs on one device, read from the text that XLA prints of it.

XLA's own `cost_analysis` counts the body of a loop once, however often it runs, and says nothing about collectives.
A model whose layers are stacked is one loop. Here every computation is counted as often as it is reached:

    entry ──► while, N times ──► body ──► fusion ──► convolution          N × its operations
                                     └──► all-gather                      N × its bytes

Operations are those of matrix products and convolutions, which is what a TPU's matrix units do (the compiler writes a
product as a convolution): $2 \cdot$ outputs $\cdot$ taps $\cdot$ input channels, for taps that meet the input and not
its padding. The kernels of fused attention are closed to it: their products are counted by their names, causal ones as
if every query saw every key. Bytes are those that instructions read and write in the device's main memory; what the
compiler keeps in the memory on the chip (`S(1)` in a layout) is free.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

_BYTES = {"pred": 1, "token": 0, "opaque": 0, "c64": 8, "c128": 16, "f8": 1, "s4": 1, "u4": 1, "s2": 1, "u2": 1}
_COLLECTIVE = re.compile(
    r"^(all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast)"
    r"(-start)?$"
)
# Kernels of FlashAttention (arXiv 2205.14135, B.2 and B.4), and how many products each takes as large as the scores:
# scores and output; scores, dP, dV and dK; scores, dP and dQ.
_KERNELS = {"flash_attention": 2, "flash_mha_bwd_dkv": 4, "flash_mha_bwd_dq": 3}
# Instructions that move nothing: they name what is there, or wait for what is counted where it begins.
_FREE = {
    *("parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast", "optimization-barrier", "after-all"),
    *("while", "conditional", "call", "async-start", "async-update", "async-done", "add-dependency"),
    *("partition-id", "replica-id", "get-dimension-size", "send", "send-done", "recv", "recv-done", "copy-done"),
    *("all-gather-done", "all-reduce-done", "collective-permute-done"),
}
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,<=]*)\](\{[^{}]*\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%(\S+) = (.*)$")
_HEAD = re.compile(r"^(ENTRY )?%(\S+) \(.*\) -> .* \{$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%([^\s,}]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


@dataclass(frozen=True)
class Array:
    """A shape as XLA writes it, with the memory that it lies in (0 is the device's main memory)."""

    dtype: str
    shape: tuple[int, ...]
    memory: int = 0

    @property
    def size(self) -> int:
        """Bytes, without the padding of tiles."""
        width = _BYTES.get(self.dtype) or _BYTES.get(self.dtype[:2])
        if width is None:
            digits = re.sub(r"\D", "", self.dtype) or "8"
            width = max(int(digits) // 8, 1)
        return math.prod(self.shape) * width


def arrays(text: str) -> list[Array]:
    """The arrays of a type, tuples flattened."""
    found = []
    for dtype, sizes, layout in _ARRAY.findall(text):
        memory = re.search(r"S\((\d+)\)", layout)
        shape = tuple(int(re.sub(r"\D", "", s)) for s in sizes.split(",") if s)
        found.append(Array(dtype, shape, int(memory[1]) if memory else 0))
    return found


@dataclass
class Instruction:
    """A line: its name, its result, what it does, to what, and the rest of the line."""

    name: str
    outputs: list[Array]
    opcode: str
    operands: list[str]
    rest: str
    root: bool

    @property
    def called(self) -> list[str]:
        """Computations that it names."""
        more = _BRANCHES.search(self.rest)
        branches = [name.strip().lstrip("%") for name in more[1].split(",")] if more else []
        return _CALLED.findall(self.rest) + branches


@dataclass
class Computation:
    """A block of instructions by name."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        """What it returns."""
        return next(i for i in reversed(self.instructions.values()) if i.root)

    @cached_property
    def parameters(self) -> dict[int, str]:
        """Names of its parameters by their number."""
        return {int(i.rest): i.name for i in self.instructions.values() if i.opcode == "parameter"}


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        if text[i] in "([{":
            depth += 1
        elif text[i] in ")]}":
            depth -= 1
            if not depth:
                return i
    return len(text) - 1


def _instruction(match: re.Match) -> Instruction:
    text = match[3]
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    kind, text = text[:end], text[end:].lstrip()
    opening = text.index("(")
    closing = _closing(text, opening)
    inside = text[opening + 1 : closing]
    opcode = text[:opening]
    operands = re.findall(r"%([^\s,()]+)", inside)
    rest = inside if opcode in ("parameter", "constant") else text[closing + 1 :]
    return Instruction(match[2], arrays(kind), opcode, operands, rest, bool(match[1]))


@dataclass(frozen=True)
class Collective:
    """Equal collectives of a program.

    Attributes:
        kind: `all-gather`, `all-reduce`, `reduce-scatter`, `all-to-all`, `collective-permute` …
        devices: how many take part in one.
        bytes: of one, the larger of what a device puts in and what it gets out.
        count: how often it runs.
    """

    kind: str
    devices: int
    bytes: int
    count: int

    @property
    def sent(self) -> float:
        """Bytes that one device sends in all of them, by the algorithm of a ring."""
        share = (self.devices - 1) / self.devices
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0, "collective-broadcast": 1.0}
        return self.count * self.bytes * factor.get(self.kind, share)


@dataclass
class Program:
    """The counts of a program on one device.

    Attributes:
        flops: operations of matrix products and convolutions, a multiplication and an addition each.
        bytes: read from and written to main memory.
        collectives: by kind, number of devices and size.
        unknown_loops: loops whose number of turns is not in the program; they are counted as one turn.
    """

    flops: float
    bytes: float
    collectives: list[Collective]
    unknown_loops: int


class _Reader:
    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        current: Computation | None = None
        for line in text.splitlines():
            if current is None:
                if head := _HEAD.match(line):
                    current = self.computations[head[2]] = Computation(head[2])
                    self.entry = head[2] if head[1] else self.entry
            elif line.startswith("}"):
                current = None
            elif found := _INSTRUCTION.match(line):
                instruction = _instruction(found)
                current.instructions[instruction.name] = instruction
        sizes = re.search(r"num_partitions=(\d+)", text)
        replicas = re.search(r"replica_count=(\d+)", text)
        self.devices = int(sizes[1] if sizes else 1) * int(replicas[1] if replicas else 1)
        self.flops = self.bytes = 0.0
        self.unknown_loops = 0
        self.collectives: Counter[tuple[str, int, int]] = Counter()

    def program(self) -> Program:
        self._visit(self.computations[self.entry], 1.0, False, set())
        found = [Collective(*key, count) for key, count in self.collectives.items()]
        return Program(self.flops, self.bytes, sorted(found, key=lambda c: -c.sent), self.unknown_loops)

    def _visit(self, computation: Computation, times: float, fused: bool, seen: set[str]) -> None:
        # One asynchronous collective is written in each of the fusions that it runs beside: `seen` are its channels.
        for instruction in computation.instructions.values():
            opcode = instruction.opcode
            if opcode in ("convolution", "dot"):
                self.flops += times * _operations(computation, instruction)
            if opcode == "custom-call":
                self.flops += times * _kernel_operations(computation, instruction)
            if match := _COLLECTIVE.match(opcode):
                self._collective(computation, instruction, match[1], times, fused, seen)
            if not fused and opcode not in _FREE:
                self.bytes += times * self._traffic(computation, instruction)
            if opcode == "while":
                body, condition = (
                    self.computations[re.search(rf"\b{part}=%([^\s,]+)", instruction.rest)[1]]  # type: ignore[index]
                    for part in ("body", "condition")
                )
                self._visit(body, times * self._turns(computation, instruction, condition), fused, set())
            elif opcode == "fusion" or opcode == "async-start":
                for name in instruction.called:
                    self._visit(self.computations[name], times, True, seen)
            elif opcode in ("call", "conditional"):
                for name in instruction.called:
                    self._visit(self.computations[name], times, fused, seen)

    def _collective(
        self, computation: Computation, i: Instruction, kind: str, times: float, fused: bool, seen: set[str]
    ) -> None:
        channel = re.search(r"channel_id=(\d+)", i.rest)
        if channel and fused:
            if channel[1] in seen:
                return
            seen.add(channel[1])
        operands = [array for name in i.operands for array in computation.instructions[name].outputs]
        # What begins asynchronously returns its operands too.
        results = sum(a.size for a in i.outputs) if not i.opcode.endswith("-start") else 0
        size = max(sum(a.size for a in operands), results, *(a.size for a in i.outputs))
        if (
            kind == "all-reduce"
            and fused
            and any(
                other.opcode == "dynamic-slice" and i.name in other.operands
                for other in computation.instructions.values()
            )
        ):
            kind = "reduce-scatter"  # as a TPU's compiler writes it
        devices = _group(i.rest, self.devices)
        if devices > 1:
            self.collectives[kind, devices, size] += round(times)

    def _turns(self, computation: Computation, loop: Instruction, condition: Computation) -> float:
        known = re.search(r"known_trip_count\D+(\d+)", loop.rest)
        if known:
            return float(known[1])
        test = condition.root
        while test.opcode in ("fusion", "call"):
            inner = self.computations[test.called[0]]
            given = dict(zip(sorted(inner.parameters), test.operands, strict=False))
            test = _substituted(inner, given)
        if test.opcode != "compare" or len(test.operands) != 2:
            self.unknown_loops += 1
            return 1.0
        ends = [self._value(computation, loop, condition, name) for name in test.operands]
        if None in ends or "direction=LT" not in test.rest:
            self.unknown_loops += 1
            return 1.0
        return float(max(ends[1] - ends[0], 1))  # type: ignore[operator]

    def _value(self, outer: Computation, loop: Instruction, condition: Computation, name: str) -> int | None:
        """An integer of a loop's condition: a constant there, or one that the loop begins with."""
        i = condition.instructions.get(name)
        while i is not None and i.opcode in ("copy", "convert", "bitcast"):
            i = condition.instructions.get(i.operands[0])
        if i is not None and i.opcode == "constant":
            return int(i.rest) if re.fullmatch(r"-?\d+", i.rest) else None
        if i is None or i.opcode != "get-tuple-element":
            return None
        start = outer.instructions[loop.operands[0]]
        if start.opcode != "tuple":
            return None
        given: Instruction | None = outer.instructions[start.operands[int(re.search(r"index=(\d+)", i.rest)[1])]]  # type: ignore[index]
        while given is not None and given.opcode in ("copy", "convert", "bitcast"):
            given = outer.instructions.get(given.operands[0])
        if given is not None and given.opcode == "constant" and re.fullmatch(r"-?\d+", given.rest):
            return int(given.rest)
        return None

    def _traffic(self, computation: Computation, i: Instruction) -> float:
        """Bytes that an instruction moves in main memory."""
        if i.opcode == "custom-call" and "AllocateBuffer" in i.rest:
            return 0.0
        outputs = sum(a.size for a in i.outputs if a.memory == 0)
        operands = [computation.instructions[name].outputs for name in i.operands if name in computation.instructions]
        if i.opcode == "fusion" and i.called:
            inner = self.computations[i.called[0]]
            read = sum(_read(inner, index, given) for index, given in enumerate(operands))
            return read + sum(self._written(inner, index, a) for index, a in enumerate(i.outputs) if a.memory == 0)
        if i.opcode in ("dynamic-slice", "gather", "slice"):
            return 2.0 * outputs
        if i.opcode == "dynamic-update-slice":
            return 2.0 * sum(a.size for a in operands[1])
        if i.opcode == "copy-start":
            outputs = sum(a.size for a in i.outputs[:1] if a.memory == 0)
        return outputs + sum(a.size for given in operands for a in given if a.memory == 0)

    def _written(self, inner: Computation, index: int, array: Array) -> float:
        root = inner.root
        if root.opcode == "tuple":
            root = inner.instructions[root.operands[index]]
        while root.opcode in ("bitcast", "copy"):
            root = inner.instructions[root.operands[0]]
        if root.opcode == "dynamic-update-slice":
            return float(sum(a.size for a in inner.instructions[root.operands[1]].outputs))
        return float(array.size)


def _substituted(inner: Computation, given: dict[int, str]) -> Instruction:
    root = inner.root
    numbers = {name: number for number, name in inner.parameters.items()}
    names = [given.get(numbers[name], name) if name in numbers else name for name in root.operands]
    return Instruction(root.name, root.outputs, root.opcode, names, root.rest, True)


def _read(inner: Computation, index: int, given: list[Array]) -> float:
    """Bytes that a fusion reads of an operand: all, or the slices that it takes."""
    whole = float(sum(a.size for a in given if a.memory == 0))
    name = inner.parameters.get(index)
    users = [i for i in inner.instructions.values() if name in i.operands]
    taken = 0.0
    for user in users:
        if user.opcode in ("dynamic-slice", "gather", "slice") and user.operands[0] == name:
            taken += sum(a.size for a in user.outputs)
        elif not (user.opcode == "dynamic-update-slice" and user.operands[0] == name):
            return whole
    return min(taken, whole)


def _group(rest: str, everyone: int) -> int:
    """How many devices take part in each group of a collective."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", found[2]))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(found[1].split(","))
    if "source_target_pairs" in rest:
        return 2
    return everyone


def _operations(computation: Computation, i: Instruction) -> float:
    left, right = (computation.instructions[name].outputs[0] for name in i.operands[:2])
    out = i.outputs[0]
    if i.opcode == "dot":
        found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)
        summed = [left.shape[int(axis)] for axis in found[1].split(",") if axis] if found else []
        return 2.0 * math.prod(out.shape) * math.prod(summed)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest)
    assert labels is not None
    kernel = dict(zip(labels[2], right.shape, strict=True))
    data = dict(zip(labels[1], left.shape, strict=True))
    result = dict(zip(labels[3], out.shape, strict=True))
    window = re.search(r"window=\{([^}]*)\}", i.rest)
    fields = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}
    total = 2.0 * result["b"] * result["f"] * kernel["i"]
    groups = re.search(r"batch_group_count=(\d+)", i.rest)
    if groups:
        total /= int(groups[1])
    for axis in range(len(labels[3]) - 2):
        name = str(axis)
        total *= _meetings(data[name], kernel[name], result[name], axis, fields)
    return total


def _kernel_operations(computation: Computation, i: Instruction) -> float:
    products = next((n for name, n in _KERNELS.items() if i.name.startswith(name)), 0)
    if not products or "tpu_custom_call" not in i.rest:
        return 0.0
    query, key = (computation.instructions[name].outputs[0].shape for name in i.operands[:2])
    return 2.0 * products * math.prod(query) * key[2]


def _meetings(data: int, kernel: int, out: int, axis: int, fields: dict[str, str]) -> int:
    """Pairs of an output and a tap of one axis that meet an element of the input: not its padding, not its holes."""

    def of(name: str, default: int) -> int:
        return int(fields[name].split("x")[axis]) if name in fields else default

    stride, hole, spread = of("stride", 1), of("lhs_dilate", 1), of("rhs_dilate", 1)
    low = int(fields["pad"].split("x")[axis].split("_")[0]) if "pad" in fields else 0
    last = (data - 1) * hole
    if hole == 1 and stride == 1 and spread == 1 and low == 0 and out + kernel - 1 <= data:
        return out * kernel
    return (
        sum(_hits(o * stride - low, spread, kernel, hole, last) for o in range(out))
        if out <= kernel
        else sum(_hits(k * spread - low, stride, out, hole, last) for k in range(kernel))
    )


def _hits(start: int, step: int, count: int, hole: int, last: int) -> int:
    """How many of `start + j step`, `j < count`, lie in [0, last] at a multiple of `hole`."""
    if step < 0:
        return 0
    if step == 0:
        return count if 0 <= start <= last and start % hole == 0 else 0
    first = max(0, -(start // step))
    final = min(count - 1, (last - start) // step)
    if final < first:
        return 0
    if hole == 1:
        return final - first + 1
    common = math.gcd(step, hole)
    period = hole // common
    found = next((j for j in range(first, min(final, first + period - 1) + 1) if (start + j * step) % hole == 0), None)
    return 0 if found is None else (final - found) // period + 1


def collectives_by_kind(collectives: list[Collective]) -> dict[str, tuple[int, float]]:
    """For each kind how many run and the bytes that one device sends in them."""
    totals: dict[str, tuple[int, float]] = {}
    for c in collectives:
        count, sent = totals.get(c.kind, (0, 0.0))
        totals[c.kind] = (count + c.count, sent + c.sent)
    return dict(sorted(totals.items(), key=lambda item: -item[1][1]))


def read(text: str) -> Program:
    """The counts of a compiled program (`compiled.as_text()`)."""
    return _Reader(text).program()
