"""Counts of a compiled program's reads, writes, products and messages, from its HLO text.

XLA's own count, `cost_analysis`, takes a loop for one round, counts arrays in the memory of a core like those in the
device's memory, and is empty for GPUs. This count goes through the kernels of the program instead: each instruction
outside of a fusion reads its operands and writes its results, as often as the loops around it go round. A fusion that
takes a slice of an operand reads the slice only, and one that updates a slice writes the slice only.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import numpy as np

_BYTES = {"pred": 1, "bf16": 2, "token": 0, "opaque": 0}  # of others the name has the bits
_DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "f64": "float64"}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?(\S+) = (.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|called_computation)=%?([\w.<>-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.<>-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# These move nothing themselves: they name arrays, or what they call is counted.
_NAMES_ONLY = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while", "conditional", "call",
    "partition-id", "replica-id", "opt-barrier", "domain", "add-dependency",
}  # fmt: skip
_RUNS = {"fusion", "call", "call-start", "async-start"}  # what they call, for themselves
_SAME_ARRAY = {"bitcast", "reshape"}
_TAKES_PART = {"slice", "dynamic-slice", "gather", "slice-start", "dynamic-slice-start"}
_UPDATES_PART = {"dynamic-update-slice": 1, "scatter": 2}  # the operand that is the update


class HloError(Exception):
    """The text has something that this does not know; the message says what."""


class Array(NamedTuple):
    """An array as the program has it."""

    dtype: str
    sizes: tuple[int, ...]
    bytes: int
    space: int  # 0: memory of the device; others: in the core

    @property
    def data_bytes(self) -> int:
        """Bytes, without padding to tiles."""
        return int(prod(self.sizes) * _width(self.dtype))


class Instruction(NamedTuple):
    """A line of the text."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def called(self) -> str | None:
        """The computation that a fusion, call or asynchronous start runs."""
        found = _CALLED.search(self.attributes)
        return found and found[1]


class Kernel(NamedTuple):
    """An instruction that is started for itself, with the computation that it is in, and how often it is started."""

    instruction: Instruction
    computation: str
    times: int


class Transfer(NamedTuple):
    """One collective operation.

    Args:
        kind: "all-reduce", "all-gather" and so on.
        times: how often it is started.
        arrays: on one device: the results, of a reduce-scatter the operands.
        groups: the devices that exchange something, counted in the order of the mesh; of a collective-permute, pairs of
            a sender and a receiver.
    """

    kind: str
    times: int
    arrays: tuple[Array, ...]
    groups: tuple[tuple[int, ...], ...]

    @property
    def bytes(self) -> int:
        """Bytes of the arrays as they lie in memory, each time."""
        return sum(array.bytes for array in self.arrays)

    @property
    def sent(self) -> float:
        """Bytes that one device has to send at least, each time; see `Program.collectives`."""
        return least_sent(self.kind, self.bytes, len(self.groups[0]))


def least_sent(kind: str, size: float, group: int) -> float:
    """Return how many bytes each device must send at least in a collective operation.

    Of an array of B bytes in a group of n: 2 B (n-1)/n to reduce it on all devices, and B (n-1)/n to gather it, to
    reduce and scatter it, or to exchange its parts.

    Example:
        >>> least_sent("all-reduce", 1000, 4)
        1500.0
    """
    if kind == "collective-permute":
        return float(size)
    return (2 if kind == "all-reduce" else 1) * size * (group - 1) / group


@dataclass(frozen=True)
class Collective:
    """Collective operations of one kind.

    Args:
        kind: "all-reduce", "all-gather" and so on.
        count: how many are started.
        bytes: of the arrays on one device, over all of them: the results, of a reduce-scatter the operands.
        sent: bytes that one device has to send at least.
    """

    kind: str
    count: int
    bytes: int
    sent: float


@dataclass(frozen=True)
class Program:
    """A program, by computation and instruction.

    Args:
        computations: the instructions of each computation, by name.
        entry: the name of the computation that starts.
    """

    computations: dict[str, dict[str, Instruction]] = field(repr=False)
    entry: str

    @cached_property
    def kernels(self) -> tuple[Kernel, ...]:
        """The kernels.

        Raises:
            HloError: the program has a loop whose number of rounds is not known.
        """
        return tuple(self._kernels(self.entry, 1))

    def _kernels(self, computation: str, times: int) -> Iterator[Kernel]:
        for instruction in self.computations[computation].values():
            opcode = instruction.opcode
            if opcode == "while":
                yield from self._kernels(
                    _attribute(instruction, "body"), times * self._rounds(computation, instruction)
                )
            elif opcode == "conditional":
                branches = [name for pair in _BRANCHES.findall(instruction.attributes) for name in pair if name]
                names = [name.strip().lstrip("%") for joined in branches for name in joined.split(",")]
                # The one that moves most.
                yield from max((list(self._kernels(name, times)) for name in names), key=self._bytes_of)
            elif opcode in _RUNS - {"fusion"} and instruction.called:
                yield from self._kernels(instruction.called, times)
            elif opcode not in _NAMES_ONLY and not opcode.endswith(("-done", "-update")):
                yield Kernel(instruction, computation, times)

    def _rounds(self, computation: str, loop: Instruction) -> int:
        """Return how often a loop goes round: what XLA knows of it, or what its condition compares a counter with."""
        known = _TRIPS.search(loop.attributes)
        if known:
            return int(known[1])
        condition = self.computations[_attribute(loop, "condition")]
        compare = next(each for each in condition.values() if each.is_root)
        if compare.opcode == "compare" and _attribute(compare, "direction") == "LT":
            counter, end = (condition[name] for name in compare.operands)
            if counter.opcode == "get-tuple-element" and end.opcode == "constant":
                index = int(_attribute(counter, "index"))
                start = self._constant(computation, loop.operands[0], index)
                if start is not None and self._counts_by_one(_attribute(loop, "body"), index):
                    return max(int(end.attributes.partition(")")[0]) - start, 0)
        raise HloError(f"the number of rounds of the loop {loop.name} is not known")

    def _constant(self, computation: str, name: str, index: int) -> int | None:
        """Return an integer of a tuple if it is a constant."""
        instructions = self.computations[computation]
        made = instructions[name]
        if made.opcode != "tuple":
            return None
        value = instructions[made.operands[index]]
        while value.opcode in {"copy", "bitcast"}:
            value = instructions[value.operands[0]]
        return int(value.attributes.partition(")")[0]) if value.opcode == "constant" else None

    def _counts_by_one(self, body: str, index: int) -> bool:
        instructions = self.computations[body]
        root = next(each for each in instructions.values() if each.is_root)
        if root.opcode != "tuple":
            return False
        added = instructions[root.operands[index]]
        if added.opcode == "fusion" and added.called:
            instructions = self.computations[added.called]
            added = next(each for each in instructions.values() if each.is_root)
        steps = [instructions[name] for name in added.operands if instructions[name].opcode == "constant"]
        return added.opcode == "add" and any(each.attributes.startswith("1)") for each in steps)

    # --- Bytes ------------------------------------------------------------------------------------------------------

    def _bytes_of(self, kernels: list[Kernel]) -> int:
        return sum(kernel.times * self.kernel_bytes(kernel) for kernel in kernels)

    @cached_property
    def hbm_bytes(self) -> int:
        """Bytes that the program reads from the device's memory and writes to it."""
        return self._bytes_of(list(self.kernels))

    def bytes_as_xla_counts(self) -> int:
        """Return the bytes as `cost_analysis` counts them: one round of each loop, and arrays in the core as well."""
        return sum(self.kernel_bytes(kernel, everywhere=True) for kernel in self.kernels)

    def kernel_bytes(self, kernel: Kernel, *, everywhere: bool = False) -> int:
        """Return the bytes that a kernel reads and writes each time.

        Args:
            kernel: the kernel.
            everywhere: count arrays in the memory of a core as well.
        """
        instruction, instructions = kernel.instruction, self.computations[kernel.computation]
        if "AllocateBuffer" in instruction.attributes:
            return 0
        stated = re.search(r'"bytes_accessed":"?(\d+)', instruction.attributes)
        if instruction.opcode == "custom-call" and stated:
            return int(stated[1])  # of a Pallas kernel with a CostEstimate

        def size(array: Array) -> int:
            return array.bytes if everywhere or array.space == 0 else 0

        operands = [instructions[name].arrays for name in instruction.operands]
        if instruction.opcode == "fusion" and instruction.called:
            read = 0
            for i, arrays in enumerate(operands):
                part = self._part_read(instruction.called, i)
                read += sum(min(size(array), part) if part is not None else size(array) for array in arrays)
            written = self._written(instruction.called)
            return read + sum(min(size(array), part) for array, part in zip(instruction.arrays, written, strict=True))
        sizes = [sum(map(size, arrays)) for arrays in operands]
        results = sum(map(size, _results(instruction)))
        if instruction.opcode in _TAKES_PART:  # of the first operand, no more than is written
            part = sum(array.bytes for array in _results(instruction))
            return min(sizes[0], part) + sum(sizes[1:]) + results
        if instruction.opcode in _UPDATES_PART:  # of the first operand, as much as the update has
            update = sum(array.bytes for array in operands[_UPDATES_PART[instruction.opcode]])
            return sum(sizes[1:]) + min(results, update)
        return sum(sizes) + results

    def _part_read(self, computation: str, index: int) -> int | None:
        """Return the bytes that a fusion reads of an operand, None for all of it."""
        instructions = self.computations[computation]
        names = {
            each.name for each in instructions.values()
            if each.opcode == "parameter" and each.attributes.startswith(f"{index})")
        }  # fmt: skip
        total = 0
        while names:
            users = [(each, name) for each in instructions.values() for name in each.operands if name in names]
            names = set()
            for user, name in users:
                part: int | None
                if self._is_same_array(user) and not user.is_root:
                    names.add(user.name)
                    continue
                if user.opcode in _TAKES_PART and name == user.operands[0]:
                    part = user.arrays[0].bytes
                elif user.opcode in _UPDATES_PART and name == user.operands[0]:
                    # A scatter adds to what is there.
                    update = instructions[user.operands[_UPDATES_PART[user.opcode]]].arrays[0].bytes
                    part = update if user.opcode == "scatter" else 0
                elif user.opcode in _RUNS and user.called:
                    part = self._part_read(user.called, user.operands.index(name))
                else:
                    part = None
                if part is None:
                    return None
                total += part
        return total

    def _is_same_array(self, instruction: Instruction) -> bool:
        """Return whether an instruction of a fusion only says how its operand is to be read, and copies nothing."""
        if instruction.opcode != "fusion" or "output_to_operand_aliasing" not in instruction.attributes:
            return instruction.opcode in _SAME_ARRAY
        inside = self.computations[_attribute(instruction, "calls")].values()
        return all(each.opcode in {*_SAME_ARRAY, "parameter", "copy"} for each in inside)

    def _written(self, computation: str) -> list[int]:
        """Return the bytes that a fusion writes of each result."""
        instructions = self.computations[computation]
        root = next(each for each in instructions.values() if each.is_root)
        results = [instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
        return [part for result in results for part in self._parts_written(instructions, result)]

    def _parts_written(self, instructions: dict[str, Instruction], result: Instruction) -> list[int]:
        while result.opcode in _SAME_ARRAY:
            result = instructions[result.operands[0]]
        if result.opcode in _UPDATES_PART:
            return [instructions[result.operands[_UPDATES_PART[result.opcode]]].arrays[0].bytes]
        if result.opcode == "fusion" and result.called:
            return self._written(result.called)
        return [array.bytes for array in result.arrays]

    # --- Matrix products and collectives ----------------------------------------------------------------------------

    @cached_property
    def matrix_operations(self) -> dict[str, int]:
        """Multiplications and additions of matrix products, by the dtype of the operands."""
        total: dict[str, int] = {}
        for kernel in self.kernels:
            for computation, instruction in self._within(kernel):
                operations = self._operations(computation, instruction)
                if operations:
                    operands = [self.computations[computation][name].arrays[0] for name in instruction.operands[:2]]
                    widest = max(operands, key=lambda array: array.bytes / max(prod(array.sizes), 1))
                    dtype = _DTYPES.get(widest.dtype, widest.dtype)
                    total[dtype] = total.get(dtype, 0) + kernel.times * operations
        return total

    def _within(self, kernel: Kernel) -> Iterator[tuple[str, Instruction]]:
        """Yield the instruction of a kernel, and those of the computations that it calls."""
        waiting = [(kernel.computation, kernel.instruction)]
        while waiting:
            computation, instruction = waiting.pop()
            yield computation, instruction
            called = instruction.called
            # What a reduction applies is not a part of the program's structure.
            if instruction.opcode in _RUNS and called in self.computations:
                waiting += [(called, each) for each in self.computations[called].values()]

    def _operations(self, computation: str, instruction: Instruction) -> int:
        result = prod(instruction.arrays[0].sizes) if instruction.arrays else 0
        if instruction.opcode == "convolution":
            of_kernel = re.search(r"dim_labels=\w+_(\w+)->", instruction.attributes)
            sizes = self.computations[computation][instruction.operands[1]].arrays[0].sizes
            if of_kernel is None:
                raise HloError(f"the convolution {instruction.name} has no labels of its dimensions")
            return 2 * result * prod(sizes) // sizes[of_kernel[1].index("o")]
        if instruction.opcode == "dot" or "__cublas$" in instruction.attributes:
            contracted = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)', instruction.attributes)
            sizes = self.computations[computation][instruction.operands[0]].arrays[0].sizes
            if contracted is None:
                raise HloError(f"the product {instruction.name} has no contracted dimensions")
            return 2 * result * prod(sizes[int(i)] for i in contracted[1].replace('"', "").split(",") if i)
        return 0

    @cached_property
    def collectives(self) -> tuple[Collective, ...]:
        """Operations between devices, one entry for each kind."""
        found: dict[str, Collective] = {}
        for each in self.transfers:
            old = found.get(each.kind, Collective(each.kind, 0, 0, 0.0))
            found[each.kind] = Collective(
                each.kind,
                old.count + each.times,
                old.bytes + each.times * each.bytes,
                old.sent + each.times * each.sent,
            )
        return tuple(found.values())

    @cached_property
    def transfers(self) -> tuple[Transfer, ...]:
        """Operations between devices, each for itself.

        Raises:
            HloError: a form of their groups that is not known.
        """
        return tuple(
            self._transfer(computation, each, kernel.times)
            for kernel in self.kernels
            for computation, each in self._within(kernel)
            if each.opcode.removesuffix("-start") in _COLLECTIVES
        )

    def _transfer(self, computation: str, instruction: Instruction, times: int) -> Transfer:
        kind = instruction.opcode.removesuffix("-start")
        arrays = results = _results(instruction)
        if kind in {"all-reduce", "reduce-scatter"}:
            arrays = tuple(
                array for name in instruction.operands for array in self.computations[computation][name].arrays
            )
        if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # as TPUs have it: a fusion that keeps a part of the sum
        elif kind == "all-reduce":
            arrays = max(arrays, results, key=lambda given: sum(array.bytes for array in given))
        return Transfer(kind, times, arrays, _groups(instruction.attributes))

    def is_collective(self, kernel: Kernel) -> bool:
        """Return whether a kernel exchanges anything with other devices."""
        return any(each.opcode.removesuffix("-start") in _COLLECTIVES for _, each in self._within(kernel))


def _results(instruction: Instruction) -> tuple[Array, ...]:
    """Return the arrays that an instruction writes: not the operands and marks that a start passes on."""
    arrays, num_operands = instruction.arrays, len(instruction.operands)
    if instruction.opcode == "copy-start":
        return arrays[:1]
    if instruction.opcode in {"collective-permute-start", "slice-start", "dynamic-slice-start"}:
        return arrays[num_operands : num_operands + 1]
    if instruction.opcode == "all-gather-start":
        return arrays[num_operands:]
    if "__cublas$" in instruction.attributes:
        return arrays[:1]  # the others are room to work in
    return arrays


def _groups(attributes: str) -> tuple[tuple[int, ...], ...]:
    """Return the groups of devices, in whichever of XLA's forms they are written."""
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,]+\}(?:,\{[\d,]+\})*)\}", attributes)
    if listed:
        return tuple(_numbers(group) for group in re.findall(r"\{([\d,]+)\}", listed[1]))
    counted = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if counted:
        return _rows(_in_order(counted[3], counted[4]).reshape(int(counted[1]), int(counted[2])))
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", attributes
    )
    if named is None:
        raise HloError("a collective operation has groups in a form that is not known")
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
    dimensions = [(name, 1, size) for name, size in sizes.items()]
    chosen = set()
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named[4]):
        # Of a part of an axis its size is given, and that of the parts before it.
        part = (name, int(before), int(size)) if size else (name, 1, sizes[name])
        dimensions = [piece for each in dimensions for piece in _pieces(each, part)]
        chosen.add(part)
    order = _in_order(named[2] or ",".join(map(str, sizes.values())), named[3])
    order = order.reshape([size for _, _, size in dimensions])
    inside = [i for i, dimension in enumerate(dimensions) if dimension in chosen]
    outside = [i for i in range(len(dimensions)) if i not in inside]
    return _rows(order.transpose(outside + inside).reshape(-1, prod(size for _, _, size in chosen)))


def _pieces(dimension: tuple[str, int, int], part: tuple[str, int, int]) -> Iterator[tuple[str, int, int]]:
    """Yield the pieces that a dimension falls into if one of them is to be this part of an axis."""
    (name, before, size), (of_axis, start, count) = dimension, part
    if name != of_axis or not before <= start < before * size:
        yield dimension
        return
    pieces = [(name, before, start // before), part, (name, start * count, before * size // (start * count))]
    yield from (piece for piece in pieces if piece == part or piece[2] > 1)


def _in_order(sizes: str, permutation: str | None) -> Any:
    """Return the numbers of devices in the order of `[sizes]T(permutation)`."""
    numbers = np.arange(prod(_numbers(sizes))).reshape(_numbers(sizes))
    return numbers.transpose(_numbers(permutation)) if permutation else numbers


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _rows(groups: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(device) for device in group) for group in groups)


def _attribute(instruction: Instruction, name: str) -> str:
    found = re.search(rf"\b{name}=%?([^\s,)}}]+)", instruction.attributes)
    if found is None:
        raise HloError(f"{instruction.name} has no {name}")
    return found[1]


# --- Reading the text -----------------------------------------------------------------------------------------------


def parse(text: str) -> Program:
    """Return the program of a text, which `jax.stages.Compiled.as_text` gives.

    Raises:
        HloError: the text has no entry.

    Example:
        >>> program = parse('''
        ... ENTRY %main (x: f32[8,128]) -> f32[8,128] {
        ...   %x = f32[8,128]{1,0} parameter(0)
        ...   ROOT %y = f32[8,128]{1,0} negate(%x)
        ... }''')
        >>> program.hbm_bytes
        8192
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = None, None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif current is not None:
            found = _INSTRUCTION.match(line)
            if found:
                instruction = _parse_instruction(found[2], found[3], is_root=bool(found[1]))
                current[instruction.name] = instruction
    if entry is None:
        raise HloError("the text has no entry computation")
    return Program(computations, entry)


def _parse_instruction(name: str, rest: str, *, is_root: bool) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    start = len(opcode)
    close = _closing(rest, start)
    inside = rest[start + 1 : close]
    # A parameter has its number there, and a constant its value: they stay with the attributes.
    if opcode in {"parameter", "constant"}:
        return Instruction(name, opcode, _arrays(shape), (), rest[start + 1 :], is_root)
    operands = tuple(re.findall(r"%([^\s,()]+)", inside))
    return Instruction(name, opcode, _arrays(shape), operands, rest[close + 1 :], is_root)


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise HloError(f"brackets are not closed: {text[:80]}")


def _arrays(shape: str) -> tuple[Array, ...]:
    return tuple(_array(*found.groups()) for found in _ARRAY.finditer(shape))


def _array(dtype: str, sizes: str, layout: str | None) -> Array:
    numbers = tuple(int(size) for size in sizes.split(",") if size)
    space = re.search(r"S\((\d+)\)", layout or "")
    return Array(dtype, numbers, _padded_bytes(dtype, numbers, layout or ""), int(space[1]) if space else 0)


def _padded_bytes(dtype: str, sizes: tuple[int, ...], layout: str) -> int:
    """Return what an array takes in memory: on TPUs the last dimensions are padded to whole tiles."""
    order, _, tiles = layout.partition(":")
    tile = re.match(r"T\(([\d,]+)\)", tiles)
    if tile and order:
        by_layout = [sizes[int(i)] for i in order.split(",")]  # the fastest first
        padded = [int(size) for size in reversed(tile[1].split(","))]
        padded += [1] * (len(by_layout) - len(padded))
        sizes = tuple(-(-size // by) * by for size, by in zip(by_layout, padded, strict=False))
    return int(prod(sizes) * _width(dtype))


def _width(dtype: str) -> float:
    bits = re.search(r"\d+", dtype)
    return _BYTES.get(dtype, int(bits[0]) / 8 if bits else 0)
