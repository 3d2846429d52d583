"""A small language for native kernels: Python that writes LLVM's intermediate code.

A kernel is a Python function over `Function`; its values are `Value`s, scalars or vectors in registers, and the usual
operators on them emit instructions. Python's own loops and ifs run while the kernel is written, so they unroll and
specialise; `loop` and `when` make loops and branches that run later. No C compiler takes part: llvmlite turns the code
into machine code in this process (jit.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
POINTER = ir.PointerType()

FUSED = ("contract", "nsz")
"""Products and sums may become one instruction, but sums keep their order: a kernel for four tokens gives the same bits
as one for a single token. NaN and infinity keep their meaning."""


def vector(element: Any, lanes: int) -> Any:
    """A vector type."""
    return ir.VectorType(element, lanes)


def size_of(kind: Any) -> int:
    """Bytes of a scalar or vector type."""
    if isinstance(kind, ir.VectorType):
        return int(kind.count) * size_of(kind.element)
    if isinstance(kind, ir.IntType):
        return max(1, int(kind.width) // 8)
    return {"half": 2, "float": 4, "double": 8, "ptr": 8}[str(kind)]


class Value:
    """A value in a register. Integers shift and extend as unsigned unless a method says otherwise."""

    __slots__ = ("function", "raw")

    def __init__(self, function: Function, raw: Any) -> None:
        self.function = function
        self.raw = raw

    @property
    def kind(self) -> Any:
        return self.raw.type

    @property
    def element(self) -> Any:
        return self.kind.element if isinstance(self.kind, ir.VectorType) else self.kind

    @property
    def lanes(self) -> int:
        return int(self.kind.count) if isinstance(self.kind, ir.VectorType) else 1

    @property
    def is_float(self) -> bool:
        return not isinstance(self.element, ir.IntType)

    def _binary(self, other: Value | float, integer: str, floating: str, swapped: bool = False) -> Value:
        operands = self.raw, self.function.like(self, other).raw
        left, right = operands[::-1] if swapped else operands
        builder = self.function.builder
        if self.is_float:
            return Value(self.function, getattr(builder, floating)(left, right, flags=FUSED))
        return Value(self.function, getattr(builder, integer)(left, right))

    def __add__(self, other: Value | float) -> Value:
        return self._binary(other, "add", "fadd")

    def __radd__(self, other: float) -> Value:
        return self._binary(other, "add", "fadd", swapped=True)

    def __sub__(self, other: Value | float) -> Value:
        return self._binary(other, "sub", "fsub")

    def __rsub__(self, other: float) -> Value:
        return self._binary(other, "sub", "fsub", swapped=True)

    def __mul__(self, other: Value | float) -> Value:
        return self._binary(other, "mul", "fmul")

    def __rmul__(self, other: float) -> Value:
        return self._binary(other, "mul", "fmul", swapped=True)

    def __truediv__(self, other: Value | float) -> Value:
        return self._binary(other, "", "fdiv")

    def __rtruediv__(self, other: float) -> Value:
        return self._binary(other, "", "fdiv", swapped=True)

    def __floordiv__(self, other: Value | int) -> Value:
        return self._binary(other, "udiv", "")

    def __mod__(self, other: Value | int) -> Value:
        return self._binary(other, "urem", "")

    def __and__(self, other: Value | int) -> Value:
        return self._binary(other, "and_", "")

    def __or__(self, other: Value | int) -> Value:
        return self._binary(other, "or_", "")

    def __xor__(self, other: Value | int) -> Value:
        return self._binary(other, "xor", "")

    def __rshift__(self, other: int) -> Value:
        return self._binary(other, "lshr", "")

    def __lshift__(self, other: int) -> Value:
        return self._binary(other, "shl", "")

    def shift_signed(self, bits: int) -> Value:
        """Shifted right with copies of the sign."""
        return self._binary(bits, "ashr", "")

    def compare(self, sign: str, other: Value | float) -> Value:
        """`<`, `<=`, `==`, `!=`, `>=` or `>`; integers as signed; a NaN compares false (`!=`: true)."""
        builder, right = self.function.builder, self.function.like(self, other).raw
        if self.is_float:
            compare = builder.fcmp_unordered if sign == "!=" else builder.fcmp_ordered
            return Value(self.function, compare(sign, self.raw, right))
        return Value(self.function, builder.icmp_signed(sign, self.raw, right))

    def cast(self, element: Any, *, signed: bool = True) -> Value:
        """To lanes of another element type: extended or cut, converted between integers and floats."""
        builder, wanted = self.function.builder, element
        if self.lanes > 1 or isinstance(self.kind, ir.VectorType):
            wanted = vector(element, self.lanes)
        if wanted == self.kind:
            return self
        is_integer = isinstance(element, ir.IntType)
        if self.is_float and is_integer:
            return Value(self.function, builder.fptosi(self.raw, wanted))
        if self.is_float:
            wider = size_of(element) > size_of(self.element)
            return Value(self.function, (builder.fpext if wider else builder.fptrunc)(self.raw, wanted))
        if not is_integer:
            return Value(self.function, (builder.sitofp if signed else builder.uitofp)(self.raw, wanted))
        if element.width < self.element.width:
            return Value(self.function, builder.trunc(self.raw, wanted))
        return Value(self.function, (builder.sext if signed else builder.zext)(self.raw, wanted))

    def bits_as(self, kind: Any) -> Value:
        """The same bits read as another type of the same size."""
        return self if kind == self.kind else Value(self.function, self.function.builder.bitcast(self.raw, kind))

    def pick(self, lanes: Sequence[int], other: Value | None = None) -> Value:
        """A vector of these lanes; lanes of `other` count on from those of self."""
        second = self.raw if other is None else other.raw
        mask = ir.Constant(vector(I32, len(lanes)), list(lanes))
        return Value(self.function, self.function.builder.shuffle_vector(self.raw, second, mask))

    def lane(self, place: int) -> Value:
        """One lane as a scalar."""
        return Value(self.function, self.function.builder.extract_element(self.raw, ir.Constant(I32, place)))

    def sum(self) -> Value:
        """The sum over the lanes, in a fixed order: halves are added until one lane is left."""
        return self._fold(lambda left, right: left + right)

    def highest(self) -> Value:
        """The largest lane."""
        return self._fold(lambda left, right: left.max(right))

    def _fold(self, join: Any) -> Value:
        folded = self
        while folded.lanes > 1:
            half = folded.lanes // 2
            folded = join(folded.pick(range(half)), folded.pick(range(half, 2 * half)))
        return folded.lane(0) if isinstance(folded.kind, ir.VectorType) else folded

    def max(self, other: Value | float) -> Value:
        """The larger of two, lane by lane; where one is NaN, `other`."""
        other = self.function.like(self, other)
        return self.function.select(self.compare(">", other), self, other)

    def min(self, other: Value | float) -> Value:
        """The smaller of two, lane by lane; where one is NaN, `other`."""
        other = self.function.like(self, other)
        return self.function.select(self.compare("<", other), self, other)


class Variable:
    """A place for a value that changes inside a loop; LLVM keeps it in a register."""

    def __init__(self, function: Function, initial: Value) -> None:
        self.function = function
        self.kind = initial.kind
        self.place = function.reserve(initial.kind)
        self.set(initial)

    def get(self) -> Value:
        """What it holds now."""
        return Value(self.function, self.function.builder.load(self.place.raw, typ=self.kind))

    def set(self, value: Value) -> None:
        """Hold this from now on."""
        self.function.builder.store(value.raw, self.place.raw)


class Module:
    """The kernels that are compiled together."""

    def __init__(self) -> None:
        self.raw = ir.Module("kernels")
        self._intrinsics: dict[str, Any] = {}

    def intrinsic(self, name: str, result: Any, arguments: Sequence[Any]) -> Any:
        """A function that LLVM knows by name."""
        if name not in self._intrinsics:
            self._intrinsics[name] = ir.Function(self.raw, ir.FunctionType(result, list(arguments)), name)
        return self._intrinsics[name]


class Function:
    """One native function under construction. Arguments are pointers and 64-bit integers."""

    def __init__(self, module: Module, name: str, arguments: Sequence[Any], result: Any = None) -> None:
        self.module = module
        kind = ir.FunctionType(ir.VoidType() if result is None else result, list(arguments))
        self.raw = ir.Function(module.raw, kind, name)
        self.raw.attributes.add("nounwind")
        self.entry = self.raw.append_basic_block("entry")
        self.builder = ir.IRBuilder(self.raw.append_basic_block("body"))
        self.arguments = [Value(self, argument) for argument in self.raw.args]

    def close(self, result: Value | None = None) -> None:
        """Return, and end the function."""
        if result is None:
            self.builder.ret_void()
        else:
            self.builder.ret(result.raw)
        with self.builder.goto_block(self.entry):
            self.builder.branch(self.raw.basic_blocks[1])

    # Values ----------------------------------------------------------------------------------------------------------

    def constant(self, number: float, kind: Any) -> Value:
        """A number, in every lane of a vector type."""
        if isinstance(kind, ir.VectorType):
            return Value(self, ir.Constant(kind, [number] * kind.count))
        return Value(self, ir.Constant(kind, number))

    def constants(self, numbers: Sequence[float], element: Any) -> Value:
        """A vector of these numbers."""
        return Value(self, ir.Constant(vector(element, len(numbers)), list(numbers)))

    def like(self, model: Value, other: Value | float) -> Value:
        """A number as a constant of the type of `model`; a scalar value spread over its lanes."""
        if not isinstance(other, Value):
            return self.constant(other, model.kind)
        if isinstance(model.kind, ir.VectorType) and not isinstance(other.kind, ir.VectorType):
            return self.spread(other, model.lanes)
        return other

    def spread(self, scalar: Value, lanes: int) -> Value:
        """A vector with `scalar` in every lane."""
        kind = vector(scalar.kind, lanes)
        single = self.builder.insert_element(ir.Constant(kind, ir.Undefined), scalar.raw, ir.Constant(I32, 0))
        return Value(self, self.builder.shuffle_vector(single, single, ir.Constant(vector(I32, lanes), [0] * lanes)))

    def select(self, condition: Value, yes: Value, no: Value) -> Value:
        """`yes` where the condition holds, else `no`."""
        return Value(self, self.builder.select(condition.raw, yes.raw, no.raw))

    def call(self, name: str, result: Any, *values: Value) -> Value:
        """An intrinsic of LLVM, by its full name."""
        target = self.module.intrinsic(name, result, [value.kind for value in values])
        return Value(self, self.builder.call(target, [value.raw for value in values]))

    # Memory ----------------------------------------------------------------------------------------------------------

    def reserve(self, kind: Any, count: int = 1, align: int = 0) -> Value:
        """Memory on the stack for `count` values, as a pointer."""
        with self.builder.goto_block(self.entry):
            place = self.builder.alloca(kind, size=None if count == 1 else ir.Constant(I64, count))
        place.type = POINTER  # llvmlite still gives it the typed pointer of old LLVMs
        if align:
            place.align = align
        return Value(self, place)

    def at(self, pointer: Value, offset: Value | int, element: Any = I8) -> Value:
        """The pointer `offset` elements further."""
        raw = ir.Constant(I64, offset) if isinstance(offset, int) else offset.raw
        return Value(self, self.builder.gep(pointer.raw, [raw], source_etype=element))

    def load(self, pointer: Value, kind: Any, offset: Value | int = 0, align: int = 0) -> Value:
        """Read a value `offset` elements (of a vector: of its lanes) behind `pointer`."""
        element = kind.element if isinstance(kind, ir.VectorType) else kind
        place = self.at(pointer, offset, element)
        return Value(self, self.builder.load(place.raw, align=align or size_of(element), typ=kind))

    def store(self, value: Value, pointer: Value, offset: Value | int = 0, align: int = 0) -> None:
        """Write a value `offset` elements behind `pointer`."""
        place = self.at(pointer, offset, value.element)
        self.builder.store(value.raw, place.raw, align=align or size_of(value.element))

    def load_some(self, pointer: Value, kind: Any, count: int, offset: Value | int = 0) -> Value:
        """The first `count` lanes from memory, zeros in the others; nothing behind them is read."""
        if count >= kind.count:
            return self.load(pointer, kind, offset)
        mask = Value(self, ir.Constant(vector(I1, kind.count), [lane < count for lane in range(kind.count)]))
        name = f"llvm.masked.load.v{kind.count}{_suffix(kind.element)}.p0"
        place = self.at(pointer, offset, kind.element)
        align = self.constant(size_of(kind.element), I32)
        return self.call(name, kind, place, align, mask, self.constant(0, kind))

    def store_some(self, value: Value, pointer: Value, count: int, offset: Value | int = 0) -> None:
        """Write the first `count` lanes; nothing behind them is touched."""
        if count >= value.lanes:
            self.store(value, pointer, offset)
            return
        for lane in range(count):
            self.store(value.lane(lane), self.at(pointer, offset, value.element), lane)

    # Threads ---------------------------------------------------------------------------------------------------------

    def atomic_add(self, pointer: Value, number: Value | int) -> Value:
        """Add to a 32-bit integer that other threads change too; returns what it was."""
        value = self.constant(number, I32) if isinstance(number, int) else number
        return Value(self, self.builder.atomic_rmw("add", pointer.raw, value.raw, "seq_cst"))

    def atomic_load(self, pointer: Value) -> Value:
        """A 32-bit integer that other threads change."""
        return Value(self, self.builder.load_atomic(pointer.raw, "seq_cst", 4, typ=I32))

    def atomic_store(self, value: Value | int, pointer: Value) -> None:
        """Write a 32-bit integer for other threads to see, after everything that was written before."""
        number = self.constant(value, I32) if isinstance(value, int) else value
        self.builder.atomic_rmw("xchg", pointer.raw, number.raw, "seq_cst")

    def pause(self, is_x86: bool) -> None:
        """Tell the core that this is a waiting loop."""
        name, values = ("llvm.x86.sse2.pause", []) if is_x86 else ("llvm.aarch64.hint", [self.constant(1, I32)])
        target = self.module.intrinsic(name, ir.VoidType(), [value.kind for value in values])
        self.builder.call(target, [value.raw for value in values])

    def call_pointer(self, pointer: Value, result: Any, *values: Value) -> Value | None:
        """Call the function at an address; no value comes back where `result` is None."""
        kind = ir.FunctionType(ir.VoidType() if result is None else result, [value.kind for value in values])
        raw = self.builder.call(_Callee(pointer.raw, kind), [value.raw for value in values])
        return None if result is None else Value(self, raw)

    def call_own(self, name: str, *values: Value) -> None:
        """Call another function of this module, which returns nothing."""
        self.builder.call(self.module.raw.get_global(name), [value.raw for value in values])

    # Control ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def loop(self, stop: Value | int, start: Value | int = 0, step: Value | int = 1) -> Iterator[Value]:
        """The body of the `with` runs for start, start + step, … below stop."""
        first, last, stride = (
            self.constant(value, I64) if isinstance(value, int) else value for value in (start, stop, step)
        )
        builder, before = self.builder, self.builder.block
        head = self.raw.append_basic_block("loop")
        body = self.raw.append_basic_block("turn")
        after = self.raw.append_basic_block("done")
        builder.branch(head)
        builder.position_at_end(head)
        index = builder.phi(I64)
        index.add_incoming(first.raw, before)
        builder.cbranch(builder.icmp_signed("<", index, last.raw), body, after)
        builder.position_at_end(body)
        yield Value(self, index)
        following = builder.add(index, stride.raw, flags=("nuw", "nsw"))
        index.add_incoming(following, builder.block)
        builder.branch(head)
        builder.position_at_end(after)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """The body of the `with` runs where a scalar condition holds."""
        with self.builder.if_then(condition.raw):
            yield

    @contextmanager
    def repeat(self) -> Iterator[Any]:
        """The body of the `with` runs again and again until the condition that it hands over to `leave_if` holds."""
        body = self.raw.append_basic_block("repeat")
        after = self.raw.append_basic_block("left")
        self.builder.branch(body)
        self.builder.position_at_end(body)

        def leave_if(condition: Value) -> None:
            onward = self.raw.append_basic_block("onward")
            self.builder.cbranch(condition.raw, after, onward)
            self.builder.position_at_end(onward)

        yield leave_if
        self.builder.branch(body)
        self.builder.position_at_end(after)


def each_register(function: Function, columns: int, lanes: int, body: Callable[[Value, int], None]) -> None:
    """body(place, lanes) for every register of `columns` numbers, and body(place, rest) for what is left."""
    whole = columns - columns % lanes
    if whole:
        with function.loop(whole, 0, lanes) as place:
            body(place, lanes)
    if whole < columns:
        body(function.constant(whole, I64), columns - whole)


def field(function: Function, arguments: Value, fields: Sequence[str], name: str, kind: Any = POINTER) -> Value:
    """One field of a kernel's arguments, which are 8 bytes each, in the order of `fields`."""
    return function.load(function.at(arguments, 8 * fields.index(name)), kind, align=8)


class _Callee:
    """A pointer in a register, as what llvmlite can call."""

    def __init__(self, pointer: Any, function_type: Any) -> None:
        self.type = POINTER
        self.function_type = function_type
        self.get_reference = pointer.get_reference


def _suffix(element: Any) -> str:
    """How LLVM's names of intrinsics spell an element type."""
    return f"i{element.width}" if isinstance(element, ir.IntType) else {"half": "f16", "float": "f32"}[str(element)]
