"""``float32x8``: eight floats as one value inside numba kernels.

Auto-vectorisation is lost silently (by an index type, an aliasing doubt, a branch), so the
rasteriser does not depend on it: it is written with this explicit SIMD type. LLVM maps it to one
AVX register, or to two SSE or NEON ones. It has + - * / with vectors and scalars (a multiply and
an add contract to one fused operation), the comparisons, ``&`` of their results, and the
functions below.

"""

import operator
import threading

import numba
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

# How the kernels are compiled. 'contract' is fused multiply-add. prange only: turning every array
# expression into a parallel loop takes minutes to compile.
INNER = {"fastmath": {"contract", "nsz"}, "error_model": "numpy"}
_OTHERS = ("comprehension", "reduction", "inplace_binop", "setitem", "numpy", "stencil", "fusion")
PARALLEL = {"prange": True, **dict.fromkeys(_OTHERS, False)}
OPTIONS = {**INNER, "parallel": PARALLEL, "nogil": True}

# numba's fallback threading layer ('workqueue') does not survive concurrent calls.
_LOCK = threading.Lock()
# For less than this many Gaussians, starting threads costs more than it saves.
SERIAL_WORK = 2000


def workers_for(work: int) -> int:
    """Threads to use: torch's number (torch.set_num_threads), one for little work."""
    if work < SERIAL_WORK:
        return 1
    return max(1, min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))  # type: ignore


def run(kernel, workers: int, *args):
    """Calls a kernel with the given number of threads, and leaves the settings of numba and torch
    as they were."""
    with _LOCK:
        threads = torch.get_num_threads()
        before = numba.get_num_threads()  # at first this starts them, and sets OpenMP's number: ...
        if torch.get_num_threads() != threads:  # ... torch's, too
            torch.set_num_threads(threads)
        numba.set_num_threads(workers)
        try:
            return kernel(*args)
        finally:
            numba.set_num_threads(before)


class Float32x8(types.Type):
    def __init__(self):
        super().__init__("float32x8")


class Bool8(types.Type):
    def __init__(self):
        super().__init__("bool8")


F8, B8 = Float32x8(), Bool8()
I32 = ir.IntType(32)
VEC_F, VEC_B, VEC_I = (ir.VectorType(t, 8) for t in (ir.FloatType(), ir.IntType(1), I32))


@register_model(Float32x8)
class _Float32x8Model(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, VEC_F)


@register_model(Bool8)
class _Bool8Model(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, VEC_B)


def _splat(builder, value):
    one = builder.insert_element(ir.Constant(VEC_F, ir.Undefined), value, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, one, ir.Constant(VEC_I, [0] * 8))


def _widen(context, builder, value, ty):
    """A scalar becomes a vector of eight equal floats."""
    if ty is F8 or ty == F8:
        return value
    return _splat(builder, context.cast(builder, value, ty, types.float32))


def _binary(op, result, emit):
    @type_callable(op)
    def _(context):
        def typer(a, b):
            if (a == F8 or b == F8) and all(t == F8 or isinstance(t, types.Number) for t in (a, b)):
                return result

        return typer

    def lower(context, builder, sig, args):
        a, b = (_widen(context, builder, v, t) for v, t in zip(args, sig.args))
        return emit(builder, a, b)

    for signature in ((F8, F8), (F8, types.Number), (types.Number, F8)):
        lower_builtin(op, *signature)(lower)


_binary(operator.add, F8, lambda b, x, y: b.fadd(x, y, flags=("contract",)))
_binary(operator.sub, F8, lambda b, x, y: b.fsub(x, y, flags=("contract",)))
_binary(operator.mul, F8, lambda b, x, y: b.fmul(x, y, flags=("contract",)))
_binary(operator.truediv, F8, lambda b, x, y: b.fdiv(x, y))
_binary(operator.gt, B8, lambda b, x, y: b.fcmp_ordered(">", x, y))
_binary(operator.ge, B8, lambda b, x, y: b.fcmp_ordered(">=", x, y))
_binary(operator.lt, B8, lambda b, x, y: b.fcmp_ordered("<", x, y))
_binary(operator.le, B8, lambda b, x, y: b.fcmp_ordered("<=", x, y))


@type_callable(operator.and_)
def _type_and(context):
    def typer(a, b):
        if a == B8 and b == B8:
            return B8

    return typer


@lower_builtin(operator.and_, B8, B8)
def _lower_and(context, builder, sig, args):
    return builder.and_(*args)


def _call(builder, name, value):
    """One of LLVM's elementwise functions of a vector, e.g. ``rint``."""
    function = ir.FunctionType(VEC_F, [VEC_F])
    function = cgutils.get_or_insert_function(builder.module, function, f"llvm.{name}.v8f32")
    return builder.call(function, [value])


@intrinsic
def lanes(typingctx):
    """The vector (0, 1, ..., 7)."""

    def emit(context, builder, sig, args):
        return ir.Constant(VEC_F, [float(i) for i in range(8)])

    return F8(), emit


@intrinsic
def splat(typingctx, value):
    """A vector of eight equal floats."""

    def emit(context, builder, sig, args):
        return _widen(context, builder, args[0], sig.args[0])

    return F8(value), emit


@intrinsic
def select(typingctx, mask, yes, no):
    """Lane by lane: ``yes if mask else no``; scalars are widened."""

    def emit(context, builder, sig, args):
        yes, no = (_widen(context, builder, v, t) for v, t in zip(args[1:], sig.args[1:]))
        return builder.select(args[0], yes, no)

    return F8(mask, yes, no), emit


@intrinsic
def any8(typingctx, mask):
    """Whether one of the eight lanes is true."""

    def emit(context, builder, sig, args):
        bits = builder.bitcast(args[0], ir.IntType(8))
        return builder.icmp_unsigned("!=", bits, ir.Constant(ir.IntType(8), 0))

    return types.boolean(mask), emit


def _pointer(context, builder, array_type, array, index):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), VEC_F.as_pointer())


@intrinsic
def load8(typingctx, array, index):
    """array[index : index + 8] of a flat float32 array, unchecked."""

    def emit(context, builder, sig, args):
        return builder.load(_pointer(context, builder, sig.args[0], *args), align=4)

    return F8(array, types.uint64), emit


@intrinsic
def store8(typingctx, array, index, value):
    """array[index : index + 8] = value, unchecked."""

    def emit(context, builder, sig, args):
        builder.store(args[2], _pointer(context, builder, sig.args[0], *args[:2]), align=4)
        return context.get_dummy_value()

    return types.void(array, types.uint64, F8), emit


@intrinsic
def min8(typingctx, a, b):
    def emit(context, builder, sig, args):
        a, b = (_widen(context, builder, v, t) for v, t in zip(args, sig.args))
        return builder.select(builder.fcmp_ordered("<", a, b), a, b)

    return F8(a, b), emit


@intrinsic
def max8(typingctx, a, b):
    def emit(context, builder, sig, args):
        a, b = (_widen(context, builder, v, t) for v, t in zip(args, sig.args))
        return builder.select(builder.fcmp_ordered(">", a, b), a, b)

    return F8(a, b), emit


@intrinsic
def abs8(typingctx, a):
    def emit(context, builder, sig, args):
        return _call(builder, "fabs", args[0])

    return F8(a), emit


@intrinsic
def minus_abs8(typingctx, a):
    def emit(context, builder, sig, args):
        return builder.fneg(_call(builder, "fabs", args[0]))

    return F8(a), emit


@intrinsic
def round8(typingctx, a):
    """To the nearest integer, as floats."""

    def emit(context, builder, sig, args):
        return _call(builder, "rint", args[0])

    return F8(a), emit


@intrinsic
def ldexp8(typingctx, a, n):
    """a 2^n, by adding n to the exponent bits; a and the result are normal numbers."""

    def emit(context, builder, sig, args):
        shift = builder.shl(builder.fptosi(args[1], VEC_I), ir.Constant(VEC_I, [23] * 8))
        return builder.bitcast(builder.add(builder.bitcast(args[0], VEC_I), shift), VEC_F)

    return F8(a, n), emit


@intrinsic
def sums8(typingctx, a, b, c, d, e, f, g, h):
    """The eight horizontal sums (sum a, sum b, ..., sum h), by three rounds of pairwise adds."""

    def emit(context, builder, sig, args):
        def merge(x, y, first, second):
            first, second = ir.Constant(VEC_I, first), ir.Constant(VEC_I, second)
            left = builder.shuffle_vector(x, y, first)
            return builder.fadd(left, builder.shuffle_vector(x, y, second))

        low, high = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
        v = [merge(args[i], args[i + 4], low, high) for i in range(4)]  # a|e b|f c|g d|h
        low, high = [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]
        v = [merge(v[0], v[1], low, high), merge(v[2], v[3], low, high)]  # aabb|eeff ccdd|gghh
        return merge(v[0], v[1], [0, 2, 8, 10, 4, 6, 12, 14], [1, 3, 9, 11, 5, 7, 13, 15])

    return F8(a, b, c, d, e, f, g, h), emit
