"""Vector code: explicit LLVM vectors, so that every sum has one order on every machine.

An auto-vectorizer may not reorder float sums, so it leaves them scalar; told that it may, it picks an order of its
own. Here each operation is spelled out over vectors of 16 lanes, which LLVM maps to two AVX2 registers, one of AVX-512
or four of NEON: the same operations in the same order everywhere, at full speed. All addresses and counts are int64.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from llvmlite import ir

LANES = 16

F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
I8, I16, I32, I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)

_LLVM_TYPES = {"i": I64, "f": F32, "d": F64, "v": ir.VoidType()}
PREFIX = "spillway_"


class Written:
    """A function spelled out in LLVM instructions: its name, its signature, and what writes its body.

    The signature is one letter for the result and one per argument: ``i`` int64, ``f`` float32, ``d`` float64, ``v``
    nothing.
    """

    def __init__(self, write: Callable[..., Any], signature: str, inline: bool) -> None:
        self.write = write
        self.inline = inline
        self.name = PREFIX + write.__name__
        self.signature = signature

    def llvm_type(self) -> Any:
        """The function's type."""
        result, *arguments = [_LLVM_TYPES[letter] for letter in self.signature]
        return ir.FunctionType(result, arguments)

    def define_in(self, module: Any) -> None:
        """Write the whole function into a module."""
        function = module.globals.get(self.name) or ir.Function(module, self.llvm_type(), self.name)
        function.attributes.add("alwaysinline" if self.inline else "noinline")
        builder = ir.IRBuilder(function.append_basic_block("entry"))
        result = self.write(Emitter(builder), *function.args)
        if result is None:
            builder.ret_void()
        else:
            builder.ret(result)


def inlined(signature: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorate ``write(emitter, *values)``: every call becomes its instructions."""
    return lambda write: Written(write, signature, inline=True)


def microkernel(signature: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorate ``write(emitter, *values)``: a function of its own, compiled once and called."""
    return lambda write: Written(write, signature, inline=False)


def vector(element: Any, lanes: int) -> Any:
    """The vector type; one lane is the plain element, so that a loop's tail can use the same code as its body."""
    return element if lanes == 1 else ir.VectorType(element, lanes)


def lanes_of(value: Any) -> int:
    """How many lanes a value has."""
    return int(value.type.count) if isinstance(value.type, ir.VectorType) else 1


def element_of(value: Any) -> Any:
    """The type of a value's lanes."""
    return value.type.element if isinstance(value.type, ir.VectorType) else value.type


class Emitter:
    """Writes instructions at the builder's place; every method takes and returns LLVM values."""

    def __init__(self, builder: Any) -> None:
        self.b = builder

    # -- constants, addresses, memory ------------------------------------------------------------------------------

    def i64(self, value: int) -> Any:
        """An int64 constant."""
        return ir.Constant(I64, value)

    def const(self, like: Any, value: float | int) -> Any:
        """A constant of a value's type, the same in every lane."""
        element = element_of(like)
        one = ir.Constant(element, value)
        return one if lanes_of(like) == 1 else ir.Constant(like.type, [one] * lanes_of(like))

    def at(self, address: Any, index: Any, item_bytes: int) -> Any:
        """address + index * item_bytes."""
        return self.b.add(address, self.b.mul(index, self.i64(item_bytes)))

    def load(self, address: Any, element: Any = F32, lanes: int = LANES, align: int = 1) -> Any:
        """Read consecutive elements; no alignment is assumed."""
        pointer = self.b.inttoptr(address, vector(element, lanes).as_pointer())
        return self.b.load(pointer, align=align)

    def store(self, value: Any, address: Any, align: int = 1) -> None:
        """Write consecutive elements."""
        self.b.store(value, self.b.inttoptr(address, value.type.as_pointer()), align=align)

    def splat(self, scalar: Any, lanes: int = LANES) -> Any:
        """One scalar in every lane."""
        if lanes == 1:
            return scalar
        undefined = ir.Constant(vector(scalar.type, lanes), ir.Undefined)
        first = self.b.insert_element(undefined, scalar, ir.Constant(I32, 0))
        return self.shuffle(first, first, [0] * lanes)

    def shuffle(self, a: Any, b: Any, lanes: list[int]) -> Any:
        """Lanes of a (0 ... n-1) and b (n ... 2n-1) in a new order."""
        mask = ir.Constant(ir.VectorType(I32, len(lanes)), [ir.Constant(I32, lane) for lane in lanes])
        return self.b.shuffle_vector(a, b, mask)

    def lane_numbers(self, lanes: int = LANES) -> Any:
        """0, 1, 2 ... as int32 lanes."""
        if lanes == 1:
            return ir.Constant(I32, 0)
        return ir.Constant(ir.VectorType(I32, lanes), [ir.Constant(I32, n) for n in range(lanes)])

    # -- control ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def loop(self, start: Any, stop: Any, step: int = 1) -> Iterator[Any]:
        """``for i in range(start, stop, step)``; yields i."""
        b = self.b
        before = b.block
        body = b.append_basic_block("loop")
        after = b.append_basic_block("done")
        b.cbranch(b.icmp_signed("<", start, stop), body, after)
        b.position_at_end(body)
        i = b.phi(I64)
        i.add_incoming(start, before)
        yield i
        following = b.add(i, self.i64(step))
        i.add_incoming(following, b.block)
        b.cbranch(b.icmp_signed("<", following, stop), body, after)
        b.position_at_end(after)

    def split(self, count: Any) -> list[tuple[int, Any, Any]]:
        """Two loops over ``count``, by whole vectors and then one by one: (lanes, start, stop) of each."""
        full = self.b.and_(count, self.i64(-LANES))
        return [(LANES, self.i64(0), full), (1, full, count)]

    @contextlib.contextmanager
    def when(self, condition: Any) -> Iterator[None]:
        """Run the body only if the condition holds."""
        with self.b.if_then(condition):
            yield

    def switch(self, selector: Any, cases: list[Callable[[], None]]) -> None:
        """Run case number ``selector``; past the last, nothing."""
        b = self.b
        after = b.append_basic_block("switch.done")
        branch = b.switch(selector, after)
        for number, case in enumerate(cases):
            block = b.append_basic_block(f"case.{number}")
            branch.add_case(ir.Constant(I64, number), block)
            b.position_at_end(block)
            case()
            b.branch(after)
        b.position_at_end(after)

    def variable(self, initial: Any) -> Any:
        """A mutable local; LLVM keeps it in a register."""
        b = self.b
        with b.goto_entry_block():
            slot = b.alloca(initial.type)
        b.store(initial, slot)
        return slot

    # -- float arithmetic ------------------------------------------------------------------------------------------

    def _call(self, name: str, *args: Any) -> Any:
        kind = args[0].type
        element = {F16: "f16", F32: "f32", F64: "f64"}.get(element_of(args[0]), "i32")
        full = f"{name}.{'' if lanes_of(args[0]) == 1 else f'v{lanes_of(args[0])}'}{element}"
        function_type = ir.FunctionType(kind, [a.type for a in args])
        return self.b.call(self.declare(full, function_type), args)

    def declare(self, name: str, function_type: Any) -> Any:
        """A function known by its symbol."""
        known = self.b.module.globals.get(name)
        return ir.Function(self.b.module, function_type, name) if known is None else known

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """a * b + c, rounded once."""
        return self._call("llvm.fma", a, b, c)

    def sqrt(self, a: Any) -> Any:
        """Square root, correctly rounded."""
        return self._call("llvm.sqrt", a)

    def absolute(self, a: Any) -> Any:
        """|a|."""
        return self._call("llvm.fabs", a)

    def floor(self, a: Any) -> Any:
        """Largest whole number not above a."""
        return self._call("llvm.floor", a)

    def round_even(self, a: Any) -> Any:
        """Nearest whole number, ties to even."""
        return self._call("llvm.rint", a)

    def larger(self, a: Any, b: Any) -> Any:
        """a if a > b else b: b where either is NaN."""
        return self.b.select(self.b.fcmp_ordered(">", a, b), a, b)

    def smaller(self, a: Any, b: Any) -> Any:
        """a if a < b else b: b where either is NaN."""
        return self.b.select(self.b.fcmp_ordered("<", a, b), a, b)

    def exp2(self, x: Any) -> Any:
        """2^x in float32, relative error below 2e-7; 0 below -125, capped at 2^127, NaN stays NaN.

        x = n + f with f in [-0.5, 0.5]: a polynomial (minimax, degree 6, exactly 1 at 0) for 2^f, n added to its
        exponent bits. Adding 1.5 * 2^23 leaves n in the low bits of the sum, with no conversion instruction.
        """
        b = self.b
        integer = vector(I32, lanes_of(x))
        magic = self.const(x, 12582912.0)
        inside = self.larger(self.const(x, -125.0), self.smaller(self.const(x, 127.0), x))
        shifted = b.fadd(inside, magic)
        f = b.fsub(inside, b.fsub(shifted, magic))
        result = self.const(x, 0.00015353303751908243)
        for coefficient in (
            0.0013398875016719103,
            0.009618437848985195,
            0.055503323674201965,
            0.24022647738456726,
            0.6931471824645996,
            1.0,
        ):
            result = self.fma(result, f, self.const(x, coefficient))
        bits = b.bitcast(shifted, integer)
        exponent = b.shl(bits, self.const(bits, 23))
        result = b.bitcast(b.add(b.bitcast(result, integer), exponent), x.type)
        return b.select(b.fcmp_ordered("<", x, self.const(x, -125.0)), self.const(x, 0.0), result)

    # -- across lanes ----------------------------------------------------------------------------------------------

    def fold(self, value: Any, combine: Callable[[Any, Any], Any]) -> Any:
        """Reduce 2^n lanes to a scalar, upper half with lower half at each step: one order everywhere."""
        lanes = lanes_of(value)
        while lanes > 2:
            half = lanes // 2
            low = self.shuffle(value, value, list(range(half)))
            high = self.shuffle(value, value, list(range(half, lanes)))
            value, lanes = combine(low, high), half
        if lanes == 1:
            return value
        return combine(*(self.b.extract_element(value, ir.Constant(I32, lane)) for lane in range(2)))

    def sum_lanes(self, value: Any) -> Any:
        """Sum of the lanes."""
        return self.fold(value, self.b.fadd)

    def max_lanes(self, value: Any) -> Any:
        """Largest lane."""
        return self.fold(value, self.larger)

    def min_lanes(self, value: Any) -> Any:
        """Smallest lane."""
        return self.fold(value, self.smaller)
