"""Single numbers at raw addresses, and the one atomic that shares out work."""

from llvmlite import ir

from spillway.kernels.cpu.jit.emit import F32, F64, I32, I64, inlined


@inlined("ii")
def load_int(e, address):
    """int64 at an address."""
    return e.load(address, I64, 1)


@inlined("ii")
def load_int32(e, address):
    """int32 at an address, as int64."""
    return e.b.sext(e.load(address, I32, 1), I64)


@inlined("fi")
def load_float32(e, address):
    """float32 at an address."""
    return e.load(address, F32, 1)


@inlined("vif")
def store_float32(e, address, value):
    """Write a float32."""
    e.store(value, address)


@inlined("vii")
def store_int(e, address, value):
    """Write an int64."""
    e.store(value, address)


@inlined("iii")
def fetch_add(e, address, amount):
    """Add to a shared int64 (aligned) and return what it was; orders all memory around it."""
    return e.b.atomic_rmw("add", e.b.inttoptr(address, I64.as_pointer()), amount, "acq_rel")


@inlined("vif")
def fill16(e, address, value):
    """Write a float32 sixteen times."""
    e.store(e.splat(value), address)


@inlined("viii")
def copy_bytes(e, target, source, count):
    """memcpy."""
    pointer = ir.IntType(8).as_pointer()
    function = e.b.module.declare_intrinsic("llvm.memcpy", [pointer, pointer, I64])
    e.b.call(
        function, [e.b.inttoptr(target, pointer), e.b.inttoptr(source, pointer), count, ir.Constant(ir.IntType(1), 0)]
    )


@inlined("viii")
def fill_bytes(e, target, value, count):
    """memset."""
    pointer = ir.IntType(8).as_pointer()
    function = e.b.module.declare_intrinsic("llvm.memset", [pointer, I64])
    byte = e.b.trunc(value, ir.IntType(8))
    e.b.call(function, [e.b.inttoptr(target, pointer), byte, count, ir.Constant(ir.IntType(1), 0)])


@inlined("fi")
def load_double(e, address):
    """float64 at an address, as float32."""
    return e.b.fptrunc(e.load(address, F64, 1), F32)


@inlined("fff")
def log_sum(e, maximum, total):
    """ln(total * 2^maximum): a softmax state as a natural log-sum-exp; the logarithm is libm's, in float64."""
    function = e.declare("log2", ir.FunctionType(F64, [F64]))
    exponent = e.b.fadd(e.b.call(function, [e.b.fpext(total, F64)]), e.b.fpext(maximum, F64))
    return e.b.fptrunc(e.b.fmul(exponent, ir.Constant(F64, 0.6931471805599453)), F32)


@inlined("ff")
def exp2(e, x):
    """2^x, see `Emitter.exp2`."""
    return e.exp2(x)
