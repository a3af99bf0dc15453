"""Runs kernels from their PTX on the CPU and counts the instructions that warps issue.

PTX is what nvcc makes of CUDA sources before it is translated for one GPU, so this executes the
compiled kernels, inline assembly included, and not their sources. A warp's 32 lanes are one NumPy
vector. Of lanes that have parted, those at the lowest instruction go first, and whoever comes to a
collective waits there for the others; how a GPU would bring them together again is not stated by
PTX, and its count may differ a little. Device memory is this process's own, by address. What is
here is what the kernels use; anything else is refused when a kernel is decoded.

Shared memory is watched: where two threads touch a byte, one of them to write, and no barrier of
their warp, or of their block, lies between, the kernel races and is stopped. Shuffles and votes are
no barriers.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

LANES = 32
SHARED_WINDOW = 0x7000_0000_0000  # generic addresses of shared memory begin here
PARAMETER_BYTES = 4096  # room of each parameter
SPECIAL = ("%tid.x", "%ctaid.x", "%nctaid.x", "%ntid.x")
COLLECTIVES = r"shfl|vote|redux|bar\.|barrier|mma"

TYPES = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16,
    "u16": np.uint16, "s16": np.int16, "b32": np.uint32, "u32": np.uint32, "s32": np.int32,
    "f32": np.float32, "b64": np.uint64, "u64": np.uint64, "s64": np.int64,
}  # fmt: skip
BITS: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

Lanes: TypeAlias = "np.ndarray[Any, Any]"
Operation = Callable[["Warp", Lanes], "str | None"]  # of the active lanes; what kind of jump it was
Reader = Callable[["Warp"], Lanes]
Writer = Callable[["Warp", Lanes, Lanes], None]


class Line(NamedTuple):
    """One instruction: its text, and the function and line of the source that it comes from."""

    text: str
    function: str  # mangled; empty in the kernel itself
    source: tuple[str, int]


class Kernel:
    """A kernel's code."""

    def __init__(self, name: str, text: str, files: dict[int, str], names: dict[str, str]) -> None:
        """Parse what stands between `.entry` and the next kernel."""
        self.name = name
        head, body = text.split("{", 1)
        self.parameters = re.findall(r"\.param [^\n]*?(\w+_param_\d+)", head)
        self.registers: dict[str, str] = {}
        self.lines: list[Line] = []
        self.labels: dict[str, int] = {}
        function, source = "", ("", 0)
        for piece in re.split(r"[;\n]", re.sub(r"//[^\n]*", "", body)):
            piece = piece.strip()
            while label := re.match(r"(\$[\w$]+):\s*(.*)", piece):
                self.labels[label[1]] = len(self.lines)
                piece = label[2]
            if piece.startswith("{ ") or piece in ("{", "}"):  # a scope
                piece = piece[1:].strip()
            if piece.startswith(".loc"):
                at = re.match(r"\.loc\s+(\d+) (\d+) \d+(?:, function_name (\S+),)?", piece)
                assert at is not None, piece
                source = (files[int(at[1])].rsplit("/", 1)[-1], int(at[2]))
                function = names.get(at[3], "") if at[3] else ""
            elif register := re.match(r"\.reg\s+\.(\w+)\s+(%?\w+)(?:<(\d+)>)?", piece):
                kind, register_name, count = register.groups()
                numbers = [""] if count is None else [str(i) for i in range(int(count))]
                self.registers |= {register_name + number: kind for number in numbers}
            elif piece and not piece.startswith("."):
                self.lines.append(Line(piece, function, source))
        collective = re.compile(rf"(@!?%p\d+\s+)?({COLLECTIVES})")
        self.is_collective = [bool(collective.match(line.text)) for line in self.lines]
        self.operations = [_decode(self, line.text, i) for i, line in enumerate(self.lines)]

    def run(
        self, arguments: Sequence[Any], blocks: int, threads: int, shared_bytes: int
    ) -> np.ndarray[Any, Any]:
        """Run a grid; return how often a warp issued each instruction. Arguments: their bytes."""
        memory = np.zeros(PARAMETER_BYTES * len(arguments), np.uint8)
        for i, argument in enumerate(arguments):
            at = PARAMETER_BYTES * i
            memory[at : at + len(bytes(argument))] = np.frombuffer(bytes(argument), np.uint8)
        counts = np.zeros(len(self.lines), np.int64)
        with np.errstate(all="ignore"):  # as on a GPU
            self._run_blocks(memory, blocks, threads, shared_bytes, counts)
        return counts

    def _run_blocks(
        self, memory: Lanes, blocks: int, threads: int, shared_bytes: int, counts: Lanes
    ) -> None:
        for block in range(blocks):
            shared = Shared(shared_bytes)
            warps = [
                Warp(self, memory, shared, first,
                     {"%ctaid.x": block, "%nctaid.x": blocks, "%ntid.x": threads})
                for first in range(0, threads, LANES)
            ]  # fmt: skip
            running = [(warp, warp.steps()) for warp in warps]
            result = False
            while running:  # each from one barrier of the block to the next
                still, votes = [], []
                for warp, steps in running:
                    try:
                        votes.append(steps.send(None if warp.fresh else result))
                        still.append((warp, steps))
                    except StopIteration:
                        pass
                    warp.fresh = False
                running, result = still, any(votes)
                shared.barrier += 1
            counts += sum(warp.counts for warp in warps)


class Shared:
    """A block's shared memory, and who touched each byte last."""

    MANY = -2  # threads, or warps, have read it since their last barrier

    def __init__(self, size: int) -> None:
        """Begin with bytes that no one has written."""
        self.size = size
        self.bytes = np.full((size + 7) // 8 * 8, 0xFF, np.uint8)
        self.barrier = 1  # of the block: how many there have been
        # Of the last write and the last read: the thread, its warp, and the barriers of either.
        self._last = {kind: {"thread": np.full(len(self.bytes), -1), **{
            what: np.zeros(len(self.bytes), np.int64) for what in ("warp", "own", "block")
        }} for kind in ("written", "read")}  # fmt: skip

    def touch(self, warp: Warp, address: Lanes, width: int, active: Lanes, writes: bool) -> None:
        """Note an access of `width` bytes by the active lanes; raise where it races."""
        threads = np.repeat(warp.special["%tid.x"][active].astype(np.int64), width)
        at = (address[:, None] + np.arange(width)).ravel()
        _, place, lanes = np.unique(at, return_inverse=True, return_counts=True)
        several = lanes[place] > 1
        if writes and several.any():
            raise RuntimeError(f"{warp.place()}: lanes write to the same shared memory at once")
        for kind in ("written", "read") if writes else ("written",):
            last = {what: values[at] for what, values in self._last[kind].items()}
            same_warp = last["warp"] == warp.index
            unordered = np.where(same_warp, last["own"] == warp.barrier,
                                 last["block"] == self.barrier)  # fmt: skip
            races = unordered & (last["thread"] != -1) & (last["thread"] != threads)
            if races.any():
                raise RuntimeError(
                    f"{warp.place()}: thread {threads[races][0]} {'writes' if writes else 'reads'} "
                    f"shared memory that another has {kind} since the last barrier"
                )
        last = self._last["written" if writes else "read"]
        warps = np.full(len(at), warp.index)
        if not writes:
            mine = last["warp"][at] == warp.index
            since = np.where(
                mine, last["own"][at] == warp.barrier, last["block"][at] == self.barrier
            )
            others = since & (last["thread"][at] != -1) & (last["thread"][at] != threads)
            threads = np.where(several | others, self.MANY, threads)
            warps = np.where(others & ~mine, self.MANY, warps)
        now = {"thread": threads, "warp": warps, "own": warp.barrier, "block": self.barrier}
        for what, value in now.items():
            last[what][at] = value


class Warp:
    """32 lanes on their way through a kernel."""

    def __init__(
        self, kernel: Kernel, parameters: Lanes, shared: Shared, first: int, special: dict[str, int]
    ) -> None:
        """Set up the threads from the first-th on, of a block that may end within this warp."""
        self.kernel, self.shared, self.index = kernel, shared, first // LANES
        self.barrier = 1  # of the warp, those of the block among them: how many there have been
        self.here = 0
        wide = {"pred": np.bool_, "b16": np.uint16, "b32": np.uint32, "f32": np.uint32,
                "u32": np.uint32, "b64": np.uint64}  # fmt: skip
        self.registers = {name: np.zeros(LANES, wide[kind])
                          for name, kind in kernel.registers.items()}  # fmt: skip
        self.special = {name: np.full(LANES, value, np.uint32) for name, value in special.items()}
        self.special["%tid.x"] = np.arange(first, first + LANES, dtype=np.uint32)
        self.spaces = {
            space: {size: memory.view(bits) for size, bits in BITS.items()}
            for space, memory in (("param", parameters), ("shared", shared.bytes))
        }
        self.at = np.zeros(LANES, np.int64)  # the next instruction of each lane
        self.at[self.special["%tid.x"] >= special["%ntid.x"]] = len(kernel.lines)
        self.counts = np.zeros(len(kernel.lines), np.int64)
        self.vote, self.block_vote, self.fresh = False, False, True

    def place(self) -> str:
        """Say where the warp is."""
        line = self.kernel.lines[self.here]
        return f"{line.source[0]}:{line.source[1]} ({line.text})"

    def steps(self) -> Generator[bool, bool, None]:
        """Run to the end; yield this warp's vote at each barrier of the block, to be sent all's."""
        end, operations, is_collective = (
            len(self.kernel.lines), self.kernel.operations, self.kernel.is_collective,
        )  # fmt: skip
        while True:
            at = int(self.at.min())
            if at >= end:
                return
            active = self.at == at
            if is_collective[at] and not active.all():
                waits = np.array([i >= end or is_collective[i] for i in self.at])
                if waits.all():
                    lines = {self.kernel.lines[i].text for i in set(self.at) if i < end}
                    raise RuntimeError(f"lanes of a warp wait for each other: {sorted(lines)}")
                at = int(self.at[~waits].min())
                active = self.at == at
            self.counts[at] += 1
            self.here = at
            kind = operations[at](self, active)
            if kind == "barrier":
                self.barrier += 1
                self.block_vote = yield self.vote
                operations[at](self, ~active)  # no lane: takes the result
            if kind != "jump":
                self.at[active] = at + 1


class Kernels(dict[str, Kernel]):
    """A module's kernels by mangled name, each decoded when it is asked for first."""

    def __init__(self, parts: dict[str, tuple[str, str, dict[int, str], dict[str, str]]]) -> None:
        super().__init__()
        self.parts = parts

    def __missing__(self, name: str) -> Kernel:
        self[name] = Kernel(*self.parts[name])
        return self[name]


def parse(text: str) -> Kernels:
    """Return a PTX module's kernels."""
    files = {int(n): name for n, name in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', text, re.M)}
    names = {}
    for label, data in re.findall(r"(\$L__info_string\d+):\s*\n((?:\.b8[^\n]*\n)+)", text):
        codes = bytes(int(code) for code in re.findall(r"\d+", data.replace(".b8", "")))
        names[label] = codes.rstrip(b"\0").decode()
    parts = {}
    for part in re.split(r"^(?:\.visible )?\.entry ", text, flags=re.M)[1:]:
        name = part.split("(")[0].strip()
        code = re.split(r"^\s*\.(?:section|file)", part, flags=re.M)[0]
        parts[name] = (name, code, files, names)
    return Kernels(parts)


# --- Operands ------------------------------------------------------------------------------------


def _process_memory(size: int) -> Lanes:
    """Return all of the process's addresses from PARAMETER_BYTES on as one array."""
    kind: Any = {1: ctypes.c_uint8, 2: ctypes.c_uint16, 4: ctypes.c_uint32, 8: ctypes.c_uint64}
    count = ((1 << 47) - PARAMETER_BYTES) // size - 16
    return np.frombuffer((kind[size] * count).from_address(PARAMETER_BYTES), BITS[size])


_GLOBAL = {size: _process_memory(size) for size in BITS}


def _operands(text: str) -> list[str]:
    """Split at commas that are in no brackets."""
    return [part.strip() for part in re.split(r",(?![^{\[]*[}\]])", text) if part.strip()]


def _reader(kernel: Kernel, operand: str, kind: str) -> Reader:
    """Return what gives an operand's values as one type."""
    dtype = np.dtype(TYPES[kind])
    bits = BITS[dtype.itemsize]
    if operand.startswith("!"):
        positive = _reader(kernel, operand[1:], kind)
        return lambda warp: ~positive(warp)
    if operand in kernel.registers:
        if kind == "pred":
            return lambda warp: warp.registers[operand]
        return lambda warp: warp.registers[operand].astype(bits, copy=False).view(dtype)
    if operand in SPECIAL:
        return lambda warp: warp.special[operand].astype(bits).view(dtype)
    if operand in kernel.parameters:
        value = kernel.parameters.index(operand) * PARAMETER_BYTES
    elif operand.startswith("0f"):
        value = int(operand[2:], 16)
    elif operand.endswith("dynamic_sharedE"):
        value = 0
    else:
        value = int(operand, 0)
    if kind == "pred":
        truth = np.full(LANES, value != 0)
        return lambda warp: truth
    constant = np.full(LANES, value & ((1 << 8 * dtype.itemsize) - 1), bits).view(dtype)
    return lambda warp: constant


def _writer(kernel: Kernel, operand: str) -> Writer:
    """Return what writes a register's active lanes; a narrower value is extended by its sign."""
    if operand == "_":
        return lambda warp, values, active: None
    unsigned = kernel.registers[operand] != "pred"

    def write(warp: Warp, values: Lanes, active: Lanes) -> None:
        register = warp.registers[operand]
        if unsigned and values.dtype.itemsize != register.dtype.itemsize:
            signed = values.dtype.kind == "i"
            values = values.astype(f"i{register.dtype.itemsize}" if signed else register.dtype)
        np.copyto(register, values.view(register.dtype), where=active)

    return write


def _items(operand: str) -> list[str]:
    """Return the members of a vector {a, b}, or the one operand."""
    return [item.strip() for item in operand.strip("{}").split(",")]


# --- Instructions --------------------------------------------------------------------------------


def _decode(kernel: Kernel, text: str, index: int) -> Operation:
    """Return what one instruction does."""
    match = re.match(r"(?:@(!?%p\d+)\s+)?(\S+)\s*(.*)", text)
    assert match is not None, text
    guard, opcode, rest = match.groups()
    parts, operands = opcode.split("."), _operands(rest)
    if parts[0] == "bra":
        target = kernel.labels[operands[0]]
        taken = _reader(kernel, guard, "pred") if guard else None

        def jump(warp: Warp, active: Lanes) -> str:
            goes = active if taken is None else active & taken(warp)
            warp.at[active] = index + 1
            warp.at[goes] = target
            return "jump"

        return jump
    make = _MAKERS.get(parts[0])
    rounds = {"rz", "rm", "rp"} & set(parts)
    if make is None or (rounds and (make not in (_multiply, _fused) or "rz" in parts)):
        raise NotImplementedError(f"{kernel.name}: {text}")
    operation = make(kernel, parts, operands)
    if not guard:
        return operation
    condition = _reader(kernel, guard, "pred")

    def guarded(warp: Warp, active: Lanes) -> str | None:
        chosen = active & condition(warp)
        return operation(warp, chosen) if chosen.any() else None

    return guarded


def _simple(kernel: Kernel, operands: list[str], kinds: Sequence[str], compute: Any) -> Operation:
    """Return an instruction whose first operand becomes `compute` of the others."""
    write = _writer(kernel, operands[0])
    readers = [_reader(kernel, o, kind) for o, kind in zip(operands[1:], kinds, strict=True)]

    def operation(warp: Warp, active: Lanes) -> None:
        write(warp, compute(*(read(warp) for read in readers)), active)

    return operation


def _arithmetic(kernel: Kernel, parts: list[str], operands: list[str]) -> Operation:
    kind, is_float = parts[-1], parts[-1] == "f32"
    dtype: Any = TYPES[kind]

    def divide(x: Lanes, y: Lanes) -> Lanes:
        if is_float:
            return np.asarray(x / y)
        return np.trunc(x / np.where(y == 0, 1, y)).astype(dtype)

    computations: dict[str, Any] = {
        "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or,
        "xor": np.bitwise_xor, "not": np.invert, "neg": np.negative, "abs": np.abs,
        "max": np.fmax if is_float and "NaN" not in parts else np.maximum,
        "min": np.fmin if is_float and "NaN" not in parts else np.minimum,
        "div": divide, "rem": lambda x, y: (x - divide(x, y) * y).astype(dtype),
        "ex2": lambda x: _flush(np.exp2(x)) if "ftz" in parts else np.exp2(x), "lg2": np.log2,
        "rcp": lambda x: np.float32(1) / x,
    }  # fmt: skip
    return _simple(kernel, operands, [kind] * (len(operands) - 1), computations[parts[0]])


def _flush(x: Lanes) -> Lanes:
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x)


def _multiply(kernel: Kernel, parts: list[str], operands: list[str]) -> Operation:
    kind, is_wide = parts[-1], "wide" in parts
    if kind == "f32":
        return _simple(kernel, operands, [kind, kind], lambda x, y: _rounded(
            x.astype(np.float64) * y.astype(np.float64), parts
        ))  # fmt: skip
    if kind.endswith("64") and "hi" in parts:
        raise NotImplementedError(f"{kernel.name}: {'.'.join(parts)}")
    dtype: Any = TYPES[kind]
    wide: Any = np.int64 if np.dtype(dtype).kind == "i" else np.uint64
    kinds = [kind, kind] + [kind[0] + "64" if is_wide else kind] * (len(operands) - 3)

    def compute(x: Lanes, y: Lanes, *added: Lanes) -> Lanes:
        product = x.astype(wide) * y.astype(wide)
        if "hi" in parts:
            product = product >> wide(32)
        product = product if is_wide else product.astype(dtype)
        return product + added[0] if added else product

    return _simple(kernel, operands, kinds, compute)


def _fused(kernel: Kernel, parts: list[str], operands: list[str]) -> Operation:
    def compute(x: Lanes, y: Lanes, z: Lanes) -> Lanes:
        product = x.astype(np.float64) * y.astype(np.float64)
        return _rounded(product + z.astype(np.float64), parts)

    return _simple(kernel, operands, ["f32"] * 3, compute)


def _rounded(exact: Lanes, parts: list[str]) -> Lanes:
    """Round to float32: to nearest, down (.rm) or up (.rp)."""
    nearest = exact.astype(np.float32)
    beside = np.nextafter(nearest, np.float32(np.inf if "rp" in parts else -np.inf))
    back = nearest.astype(np.float64)
    wrong = back > exact if "rm" in parts else back < exact if "rp" in parts else np.False_
    return np.where(wrong & np.isfinite(exact), beside, nearest)


def _shift(kernel: Kernel, parts: list[str], operands: list[str]) -> Operation:
    kind = parts[-1]
    bits = 8 * np.dtype(TYPES[kind]).itemsize

    def compute(x: Lanes, by: Lanes) -> Lanes:
        within = np.minimum(by, bits - 1).astype(x.dtype)
        if parts[0] == "shl":
            return np.where(by >= bits, x.dtype.type(0), x << within)
        keeps = x.dtype.kind == "i"  # the sign
        return x >> within if keeps else np.where(by >= bits, x.dtype.type(0), x >> within)

    return _simple(kernel, operands, [kind, "u32"], compute)


def _funnel_shift(kernel: Kernel, parts: list[str], operands: list[str]) -> Operation:
    def compute(low: Lanes, high: Lanes, by: Lanes) -> Lanes:
        both = high.astype(np.uint64) << np.uint64(32) | low
        places = (by % 32 if "wrap" in parts else np.minimum(by, 32)).astype(np.uint64)
        shifted = both << places >> np.uint64(32) if "l" in parts else both >> places
        return shifted.astype(np.uint32)

    return _simple(kernel, operands, ["b32", "b32", "u32"], compute)


def _bits(kernel: Kernel, parts: list[str], operands: list[str]) -> Operation:
    def highest(x: int) -> int:
        return 0xFFFFFFFF if x == 0 else x.bit_length() - 1

    of_one: dict[str, Callable[[int], int]] = {
        "popc": int.bit_count,
        "clz": lambda x: 32 - x.bit_length(),
        "brev": lambda x: int(f"{x:032b}"[::-1], 2),
        "bfind": (lambda x: 31 - highest(x) if x else 0xFFFFFFFF)
                 if "shiftamt" in parts else highest,
    }  # fmt: skip
    if parts[-1].endswith("64"):
        raise NotImplementedError(f"{kernel.name}: {'.'.join(parts)}")
    count = of_one[parts[0]]
    return _simple(kernel, operands, ["b32"],
                   lambda x: np.array([count(int(value)) for value in x], np.uint32))  # fmt: skip


def _insert(kernel: Kernel, parts: list[str], operands: list[str]) -> Operation:
    kind = parts[-1]
    dtype: Any = TYPES[kind]

    def compute(field: Lanes, into: Lanes, at: Lanes, width: Lanes) -> Lanes:
        place = at.astype(dtype)
        mask = ((dtype(1) << width.astype(dtype)) - dtype(1)) << place
        return (into & ~mask) | (field << place & mask)

    return _simple(kernel, operands, [kind, kind, "u32", "u32"], compute)


def _compare(kernel: Kernel, parts: list[str], operands: list[str]) -> Operation:
    comparison, kind = parts[1], parts[-1]
    unordered = kind == "f32" and comparison.endswith(("u", "nan"))  # true where a value is NaN
    compare: Any = {
        "nu": lambda x, y: np.full(LANES, True), "na": lambda x, y: np.full(LANES, False),
        "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
        "gt": np.greater, "ge": np.greater_equal,
    }[comparison[:2]]  # fmt: skip

    def compute(x: Lanes, y: Lanes) -> Lanes:
        truth: Lanes = compare(x, y)
        if kind != "f32":
            return truth
        nan = np.isnan(x) | np.isnan(y)
        return truth | nan if unordered else truth & ~nan

    return _simple(kernel, operands, [kind, kind], compute)


def _select(kernel: Kernel, parts: list[str], operands: list[str]) -> Operation:
    kind = parts[-1]
    return _simple(kernel, operands, [kind, kind, "pred"], lambda x, y, p: np.where(p, x, y))


def _move(kernel: Kernel, parts: list[str], operands: list[str]) -> Operation:
    kind, (target, source) = parts[-1], operands
    if not (target.startswith("{") or source.startswith("{")):
        return _simple(kernel, operands, [kind], lambda x: x)
    many = _items(target if target.startswith("{") else source)
    bits = 8 * np.dtype(TYPES[kind]).itemsize // len(many)
    if target.startswith("{"):
        read, writers = _reader(kernel, source, kind), [_writer(kernel, item) for item in many]

        def unpack(warp: Warp, active: Lanes) -> None:
            for i, write in enumerate(writers):
                values = read(warp)
                write(warp, (values >> values.dtype.type(bits * i)).astype(f"u{bits // 8}"), active)

        return unpack
    readers, write_one = (
        [_reader(kernel, item, f"b{bits}") for item in many],
        _writer(kernel, target),
    )
    dtype = np.dtype(TYPES[kind])

    def pack(warp: Warp, active: Lanes) -> None:
        values = np.zeros(LANES, dtype)
        for i, read_one in enumerate(readers):
            values |= read_one(warp).astype(dtype) << dtype.type(bits * i)
        write_one(warp, values, active)

    return pack


def _convert(kernel: Kernel, parts: list[str], operands: list[str]) -> Operation:
    to, of = parts[-2], parts[-1]
    if to == "f16x2":
        return _simple(kernel, operands, ["f32", "f32"],
                       lambda high, low: _half(high) << np.uint32(16) | _half(low))  # fmt: skip
    if "sat" in parts:
        saturate: Any = lambda x: np.nan_to_num(np.clip(x, 0, 1))  # noqa: E731
        return _simple(kernel, operands, [of], saturate)
    if "rni" in parts:
        return _simple(kernel, operands, [of], lambda x: np.rint(x).astype(TYPES[to]))
    return _simple(kernel, operands, [of], lambda x: x.astype(TYPES[to]))


def _half(x: Lanes) -> Lanes:
    return x.astype(np.float16).view(np.uint16).astype(np.uint32)


def _address(kernel: Kernel, parts: list[str], operands: list[str]) -> Operation:
    """Return a conversion between generic and shared addresses; global ones are the same."""
    window = np.uint64(0 if "to" in parts else SHARED_WINDOW)
    return _simple(kernel, operands, ["b64"], lambda x: x + window)


def _memory(kernel: Kernel, parts: list[str], operands: list[str]) -> Operation:
    """Return a load, store or atomic."""
    kind = parts[-1]
    dtype = np.dtype(TYPES[kind])
    size, bits = dtype.itemsize, BITS[dtype.itemsize]
    where = next(i for i, operand in enumerate(operands) if operand.startswith("["))
    place = re.fullmatch(r"\[([%\w]+)(?:\+(-?\d+))?\]", operands[where])
    assert place is not None, operands
    base, offset = _reader(kernel, place[1], "b64"), int(place[2] or 0)
    space = next((part for part in parts if part in ("global", "shared", "param")), "generic")

    count = len(_items(operands[0 if parts[0] == "ld" else 1])) if parts[0] in ("ld", "st") else 1

    def locate(warp: Warp, active: Lanes) -> tuple[Lanes, Lanes]:
        address = base(warp)[active].astype(np.int64) + offset
        if (address % (size * count)).any():
            raise RuntimeError(f"{kernel.name}: {parts} is not aligned")
        shared = space == "shared" or (space == "generic" and address[0] >= SHARED_WINDOW)
        if shared or space == "param":
            address &= 0xFFFF_FFFF
            memory = warp.spaces["shared" if shared else "param"][size]
            room = warp.shared.size if shared else memory.nbytes
            if len(address) and address.max() + size * count > room:
                raise RuntimeError(f"{kernel.name}: {parts} is outside of its memory")
            if shared and parts[0] in ("ld", "st"):
                warp.shared.touch(warp, address, size * count, active, parts[0] == "st")
            return memory, address // size
        return _GLOBAL[size], (address - PARAMETER_BYTES) // size

    if parts[0] == "ld":
        writers = [_writer(kernel, item) for item in _items(operands[0])]

        def load(warp: Warp, active: Lanes) -> None:
            memory, at = locate(warp, active)
            loaded = [memory[at + i] for i in range(len(writers))]  # before an address is changed
            for values, write in zip(loaded, writers, strict=True):
                whole = np.zeros(LANES, bits)
                whole[active] = values
                write(warp, whole.view(dtype), active)

        return load
    if parts[0] == "st":
        readers = [_reader(kernel, item, kind) for item in _items(operands[1])]

        def store(warp: Warp, active: Lanes) -> None:
            memory, at = locate(warp, active)
            for i, read in enumerate(readers):
                memory[at + i] = read(warp)[active].view(bits)

        return store
    write = _writer(kernel, operands[0]) if parts[0] == "atom" else _writer(kernel, "_")
    values = [_reader(kernel, operand, kind) for operand in operands[where + 1 :]]
    change: Any = {
        "add": lambda old, x: old + x, "max": max, "or": lambda old, x: old | x,
        "cas": lambda old, expected, x: x if old == expected else old,
    }[next(part for part in parts[1:] if part in ("add", "max", "or", "cas"))]  # fmt: skip

    def atomic(warp: Warp, active: Lanes) -> None:
        memory, at = locate(warp, active)
        given = [read(warp)[active] for read in values]
        before = np.zeros(LANES, bits)
        for i, lane in enumerate(np.flatnonzero(active)):
            old = memory[at[i]]
            before[lane] = old
            new = np.array([change(old.view(dtype), *(x[i] for x in given))], dtype)
            memory[at[i]] = new.view(bits)[0]
        write(warp, before.view(dtype), active)

    return atomic


def _shuffle(kernel: Kernel, parts: list[str], operands: list[str]) -> Operation:
    target, *present = operands[0].split("|")
    write, write_present = _writer(kernel, target), _writer(kernel, present[0] if present else "_")
    read, by = _reader(kernel, operands[1], "b32"), _reader(kernel, operands[2], "u32")
    xor = parts[2] == "bfly"

    def shuffle(warp: Warp, active: Lanes) -> None:
        source = np.arange(LANES) ^ by(warp) if xor else by(warp) % LANES
        write(warp, read(warp)[source], active)
        write_present(warp, np.ones(LANES, bool), active)

    return shuffle


def _vote(kernel: Kernel, parts: list[str], operands: list[str]) -> Operation:
    def compute(votes: Lanes, mask: Lanes) -> Lanes:
        if parts[2] == "ballot":
            ballot = sum(1 << lane for lane in range(LANES) if votes[lane])
            return np.full(LANES, ballot, np.uint32)
        return np.full(LANES, votes.any() if parts[2] == "any" else votes.all())

    return _simple(kernel, operands, ["pred", "b32"], compute)


def _reduce(kernel: Kernel, parts: list[str], operands: list[str]) -> Operation:
    reduce: Any = {"min": np.min, "max": np.max, "add": np.sum}[parts[2]]
    return _simple(kernel, operands, [parts[-1], "b32"],
                   lambda x, mask: np.full(LANES, reduce(x), x.dtype))  # fmt: skip


def _barrier(kernel: Kernel, parts: list[str], operands: list[str]) -> Operation:
    if "warp" in parts:

        def synchronise(warp: Warp, active: Lanes) -> None:
            warp.barrier += 1

        return synchronise
    if "red" not in parts:
        return lambda warp, active: "barrier" if active.any() else None
    write, vote = _writer(kernel, operands[0]), _reader(kernel, operands[-1], "pred")

    def reduce(warp: Warp, active: Lanes) -> str | None:
        if active.any():
            warp.vote = bool(vote(warp).any())
            return "barrier"
        write(warp, np.full(LANES, warp.block_vote), ~active)
        return None

    return reduce


def _matrix(kernel: Kernel, parts: list[str], operands: list[str]) -> Operation:
    """Return mma.m16n8k16 of halves with sums in float32, by the layouts that PTX lays down."""
    assert ".".join(parts[3:]) == "m16n8k16.row.col.f32.f16.f16.f32", parts
    writers = [_writer(kernel, item) for item in _items(operands[0])]
    readers = [
        [_reader(kernel, item, kind) for item in _items(operand)]
        for operand, kind in zip(operands[1:], ("b32", "b32", "f32"), strict=True)
    ]
    group, place = np.arange(LANES) // 4, np.arange(LANES) % 4

    def halves(values: Lanes) -> Lanes:
        return values.view(np.float16).reshape(LANES, 2).astype(np.float32)

    def multiply(warp: Warp, active: Lanes) -> None:
        a, b, c = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
        for i, read in enumerate(readers[0]):
            for j in range(2):
                column = 2 * place + 8 * (i // 2) + j
                a[group + 8 * (i % 2), column] = halves(read(warp))[:, j]
        for i, read in enumerate(readers[1]):
            for j in range(2):
                b[2 * place + 8 * i + j, group] = halves(read(warp))[:, j]
        for i, read in enumerate(readers[2]):
            c[group + 8 * (i // 2), 2 * place + i % 2] = read(warp)
        sums = (c + a @ b).astype(np.float32)
        for i, write in enumerate(writers):
            write(warp, sums[group + 8 * (i // 2), 2 * place + i % 2], active)

    return multiply


def _return(kernel: Kernel, parts: list[str], operands: list[str]) -> Operation:
    def leave(warp: Warp, active: Lanes) -> str:
        warp.at[active] = len(kernel.lines)
        return "jump"

    return leave


_MAKERS: dict[str, Callable[[Kernel, list[str], list[str]], Operation]] = {
    **dict.fromkeys(("add", "sub", "and", "or", "xor", "not", "neg", "abs", "max", "min", "div",
                     "rem", "rcp", "ex2", "lg2"), _arithmetic),
    **dict.fromkeys(("mul", "mad"), _multiply),
    **dict.fromkeys(("shl", "shr"), _shift),
    **dict.fromkeys(("popc", "clz", "brev", "bfind"), _bits),
    **dict.fromkeys(("ld", "st", "atom", "red"), _memory),
    **dict.fromkeys(("bar", "barrier"), _barrier),
    "bfi": _insert, "shf": _funnel_shift, "fma": _fused, "setp": _compare, "selp": _select,
    "mov": _move, "cvt": _convert, "cvta": _address, "shfl": _shuffle, "vote": _vote,
    "redux": _reduce, "mma": _matrix,
    "ret": _return,
}  # fmt: skip
