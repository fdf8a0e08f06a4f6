"""The control code of the kernels: plain Python functions over integers, turned into LLVM functions.

What is not worth spelling out instruction by instruction (loops over blocks, tables, tasks) is written as ordinary
Python in a subset small enough to read here whole: parameters and results annotated ``int`` (int64) or ``float``
(float32); assignments, ``if``, ``while``, ``for ... in range``, ``return``, ``continue``, ``break``; arithmetic,
comparisons, ``and``, ``or``, ``not``, conditional expressions; ``min``, ``max``, ``int``, ``float``; calls of other
such functions and of `Written` ones; module-level numbers. Integers do not overflow-check, ``//`` and ``%`` round
towards zero, and ints and floats do not mix unasked. Anything else is a SubsetError that names its line.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable
from functools import reduce
from typing import Any

from llvmlite import ir

from spillway.kernels.cpu.jit.emit import F32, I64, PREFIX, Written


class SubsetError(Exception):
    """Code outside the subset: a mistake in a kernel's source, never in its input."""


class Device:
    """A function of the subset; inside the subset it can be called like one."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.name = PREFIX + function.__name__
        self.globals = function.__globals__
        annotations = inspect.get_annotations(function)
        self.parameters = list(inspect.signature(function).parameters)
        self.types = [_annotated(annotations.get(name)) for name in self.parameters]
        result = annotations.get("return")
        self.result = ir.VoidType() if result is None else _annotated(result)

    def llvm_type(self) -> Any:
        """The function's type."""
        return ir.FunctionType(self.result, self.types)


def device(function: Callable[..., Any]) -> Any:
    """Mark a function as one of the subset."""
    return Device(function)


def _annotated(annotation: Any) -> Any:
    if annotation not in (int, float, bool):
        raise SubsetError(f"a parameter or result must be annotated int or float, got {annotation}")
    return F32 if annotation is float else I64


_INT_OPS = {
    ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.FloorDiv: "sdiv", ast.Mod: "srem",
    ast.BitAnd: "and_", ast.BitOr: "or_", ast.LShift: "shl", ast.RShift: "ashr",
}  # fmt: skip
_FLOAT_OPS = {ast.Add: "fadd", ast.Sub: "fsub", ast.Mult: "fmul", ast.Div: "fdiv"}
_COMPARISONS = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!="}


class Translation:
    """Writes one function's body; functions it calls are collected in ``called``."""

    def __init__(self, source: Device, module: Any) -> None:
        self.source = source
        self.module = module
        self.called: list[Device | Written] = []
        self.function = module.globals.get(source.name) or ir.Function(module, source.llvm_type(), source.name)
        self.b = ir.IRBuilder(self.function.append_basic_block("entry"))
        self.locals: dict[str, Any] = {}
        self.loops: list[tuple[Any, Any]] = []  # (where continue goes, where break goes)

    def run(self) -> None:
        """Translate."""
        tree = ast.parse(textwrap.dedent(inspect.getsource(self.source.function))).body[0]
        assert isinstance(tree, ast.FunctionDef)
        for name, value in zip(self.source.parameters, self.function.args, strict=True):
            self._assign(name, value)
        self._statements(tree.body)
        if not self.b.block.is_terminated:
            if self.source.result != ir.VoidType():
                raise SubsetError(f"{self.source.name}: a path ends without a result")
            self.b.ret_void()

    # -- statements ------------------------------------------------------------------------------------------------

    def _statements(self, body: list[ast.stmt]) -> None:
        for statement in body:
            if self.b.block.is_terminated:
                raise self._error(statement, "unreachable")
            handler = getattr(self, f"_do_{type(statement).__name__.lower()}", None)
            if handler is None:
                raise self._error(statement, "statement outside the subset")
            handler(statement)

    def _error(self, node: Any, why: str) -> SubsetError:
        return SubsetError(f"{self.source.name}, line {node.lineno}: {why}: {ast.unparse(node)}")

    def _assign(self, name: str, value: Any) -> None:
        slot = self.locals.get(name)
        if slot is None:
            with self.b.goto_block(self.function.entry_basic_block):
                slot = self.locals[name] = self.b.alloca(value.type, name=name)
        if slot.type.pointee != value.type:
            raise SubsetError(f"{self.source.name}: {name} was an {slot.type.pointee} before")
        self.b.store(value, slot)

    def _do_assign(self, node: ast.Assign) -> None:
        (target,) = node.targets
        if isinstance(target, ast.Name):
            self._assign(target.id, self._value(node.value))
        elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            values = [self._value(element) for element in node.value.elts]
            for name, value in zip(target.elts, values, strict=True):
                assert isinstance(name, ast.Name)
                self._assign(name.id, value)
        else:
            raise self._error(node, "assignment outside the subset")

    def _do_augassign(self, node: ast.AugAssign) -> None:
        assert isinstance(node.target, ast.Name)
        value = self._binary(node, type(node.op), self._value(ast.Name(node.target.id)), self._value(node.value))
        self._assign(node.target.id, value)

    def _do_expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):  # a docstring
            self._call(node.value)

    def _do_return(self, node: ast.Return) -> None:
        if node.value is None:
            self.b.ret_void()
        else:
            self.b.ret(self._value(node.value))

    def _do_if(self, node: ast.If) -> None:
        b = self.b
        then, otherwise, after = (b.append_basic_block(n) for n in ("then", "else", "after"))
        b.cbranch(self._truth(node.test), then, otherwise)
        ends = []
        for block, body in ((then, node.body), (otherwise, node.orelse)):
            b.position_at_end(block)
            self._statements(body)
            if not b.block.is_terminated:
                b.branch(after)
                ends.append(block)
        b.position_at_end(after)
        if not ends:
            self.function.blocks.remove(after)
            b.position_at_end(then)

    def _do_while(self, node: ast.While) -> None:
        head = self.b.append_basic_block("while")
        self.b.branch(head)
        self.b.position_at_end(head)
        self._loop(node.body, self._truth(node.test), head, lambda: None)

    def _do_for(self, node: ast.For) -> None:
        """``for i in range(...)`` with a positive constant step."""
        call = node.iter
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "range"):
            raise self._error(node, "only range can be looped over")
        assert isinstance(node.target, ast.Name)
        bounds = [self._value(argument) for argument in call.args]
        start, stop = (ir.Constant(I64, 0), bounds[0]) if len(bounds) == 1 else bounds[:2]
        step = bounds[2] if len(bounds) == 3 else ir.Constant(I64, 1)
        with self.b.goto_block(self.function.entry_basic_block):
            counter = self.b.alloca(I64)
        self.b.store(start, counter)
        head = self.b.append_basic_block("for")
        self.b.branch(head)
        self.b.position_at_end(head)
        value = self.b.load(counter)
        self._assign(node.target.id, value)

        def advance() -> None:
            self.b.store(self.b.add(self.b.load(counter), step), counter)

        self._loop(node.body, self.b.icmp_signed("<", value, stop), head, advance)

    def _loop(self, body: list[ast.stmt], condition: Any, head: Any, advance: Callable[[], None]) -> None:
        b = self.b
        inside, following, after = (b.append_basic_block(n) for n in ("body", "next", "after"))
        b.cbranch(condition, inside, after)
        b.position_at_end(inside)
        self.loops.append((following, after))
        self._statements(body)
        self.loops.pop()
        if not b.block.is_terminated:
            b.branch(following)
        b.position_at_end(following)
        advance()
        b.branch(head)
        b.position_at_end(after)

    def _do_continue(self, node: ast.Continue) -> None:
        del node
        self.b.branch(self.loops[-1][0])

    def _do_break(self, node: ast.Break) -> None:
        del node
        self.b.branch(self.loops[-1][1])

    # -- expressions -----------------------------------------------------------------------------------------------

    def _value(self, node: ast.expr) -> Any:
        """An int64 or float32 value."""
        if isinstance(node, ast.Constant):
            return self._constant(node, node.value)
        if isinstance(node, ast.Name):
            if node.id in self.locals:
                return self.b.load(self.locals[node.id])
            return self._constant(node, self.source.globals.get(node.id))
        if isinstance(node, ast.BinOp):
            return self._binary(node, type(node.op), self._value(node.left), self._value(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            value = self._value(node.operand)
            return self.b.fneg(value) if value.type == F32 else self.b.neg(value)
        if isinstance(node, ast.IfExp):
            return self._choice(node.test, node.body, node.orelse)
        if isinstance(node, ast.Call):
            return self._call(node)
        return self.b.zext(self._truth(node), I64)

    def _constant(self, node: Any, value: Any) -> Any:
        if isinstance(value, bool | int):
            return ir.Constant(I64, int(value))
        if isinstance(value, float):
            return ir.Constant(F32, value)
        raise self._error(node, "neither a local nor a number")

    def _binary(self, node: Any, operator: type[ast.operator], left: Any, right: Any) -> Any:
        operations = _FLOAT_OPS if left.type == F32 else _INT_OPS
        if left.type != right.type or operator not in operations:
            raise self._error(node, "operands do not fit")
        return getattr(self.b, operations[operator])(left, right)

    def _truth(self, node: ast.expr) -> Any:
        """A condition, as one bit."""
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            left, right = self._value(node.left), self._value(node.comparators[0])
            if left.type != right.type:
                raise self._error(node, "operands do not fit")
            compare = self.b.fcmp_ordered if left.type == F32 else self.b.icmp_signed
            return compare(_COMPARISONS[type(node.ops[0])], left, right)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return self.b.not_(self._truth(node.operand))
        if isinstance(node, ast.BoolOp):
            return self._short_circuit(node)
        if isinstance(node, ast.Compare | ast.Tuple | ast.Attribute | ast.Subscript):
            raise self._error(node, "expression outside the subset")
        return self.b.icmp_signed("!=", self._value(node), ir.Constant(I64, 0))

    def _short_circuit(self, node: ast.BoolOp) -> Any:
        b = self.b
        after = b.append_basic_block("decided")
        incoming = []
        for operand in node.values[:-1]:
            bit = self._truth(operand)
            incoming.append((ir.Constant(bit.type, isinstance(node.op, ast.Or)), b.block))
            following = b.append_basic_block("or")
            b.cbranch(bit, *((after, following) if isinstance(node.op, ast.Or) else (following, after)))
            b.position_at_end(following)
        bit = self._truth(node.values[-1])
        incoming.append((bit, b.block))
        b.branch(after)
        b.position_at_end(after)
        result = b.phi(bit.type)
        for value, block in incoming:
            result.add_incoming(value, block)
        return result

    def _choice(self, test: ast.expr, body: ast.expr, orelse: ast.expr) -> Any:
        b = self.b
        then, otherwise, after = (b.append_basic_block(n) for n in ("then", "else", "chosen"))
        b.cbranch(self._truth(test), then, otherwise)
        incoming = []
        for block, expression in ((then, body), (otherwise, orelse)):
            b.position_at_end(block)
            incoming.append((self._value(expression), b.block))
            b.branch(after)
        b.position_at_end(after)
        result = b.phi(incoming[0][0].type)
        for value, block in incoming:
            result.add_incoming(value, block)
        return result

    def _call(self, node: Any) -> Any:
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            raise self._error(node, "only named functions can be called")
        name = node.func.id
        arguments = [self._value(argument) for argument in node.args]
        if name in ("min", "max") and all(argument.type == I64 for argument in arguments):
            return reduce(lambda x, y: self._extreme(name, x, y), arguments)
        if name == "float":
            return self.b.sitofp(arguments[0], F32)
        if name == "int":
            return self.b.fptosi(arguments[0], I64)
        target = self.source.globals.get(name)
        if not isinstance(target, Device | Written):
            raise self._error(node, "not a function of the subset")
        kind = target.llvm_type()
        if list(kind.args) != [argument.type for argument in arguments]:
            raise self._error(node, "arguments do not fit")
        self.called.append(target)
        known = self.module.globals.get(target.name) or ir.Function(self.module, kind, target.name)
        return self.b.call(known, arguments)

    def _extreme(self, name: str, left: Any, right: Any) -> Any:
        return self.b.select(self.b.icmp_signed("<" if name == "min" else ">", left, right), left, right)


def translate(entries: list[Device]) -> Any:
    """A module that holds these functions, visible by their names, and all they call, hidden."""
    module = ir.Module("spillway")
    waiting: list[Device | Written] = list(entries)
    done: dict[str, Device | Written] = {}
    while waiting:
        function = waiting.pop()
        if function.name in done:
            if done[function.name] is not function:
                raise SubsetError(f"two functions are called {function.name}")
            continue
        done[function.name] = function
        if isinstance(function, Written):
            function.define_in(module)
        else:
            translation = Translation(function, module)
            translation.run()
            waiting.extend(translation.called)
    for name in done.keys() - {entry.name for entry in entries}:
        module.globals[name].linkage = "internal"
    return module
