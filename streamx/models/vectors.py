"""Loops written in the compiler's own language: sums that stay in the processor's registers.

A compiler makes vector instructions of ``for c in range(64): sum[c] += x * row[c]``, but writes the sums to
memory after every row. Here they are one value of 64 lanes, which becomes 4, 8 or 16 registers, as wide as
the processor has them; nothing needs to be set for that.

Arrays are C-contiguous; ``row_v`` int32, all others float32. Nothing is checked: what is read and written
must be there.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES, FEW = 64, 16

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_FUSED = ("contract",)  # a product and its sum may be one instruction
_emitted: Any = intrinsic  # its types would count the context among the arguments of a call
_ONE, _TWO, _ROWS = (types.float32, 1), (types.float32, 2), (types.int32, 1)


@_emitted
def add_lanes(_context, sum_h, low, table_rh, row_v, value_v, start, stop):
    """sum_h += value_v[j] x table_rh[row_v[j]] for j in start..stop in order, in 64 columns from low on."""
    _check((sum_h, _ONE), (table_rh, _TWO), (row_v, _ROWS), (value_v, _ONE))
    size = types.intp
    return types.void(sum_h, size, table_rh, row_v, value_v, size, size), _add_lanes


@_emitted
def rectified_lanes(_context, out_t, table_rt, row_v, value_v, start, stop, scale_bh, shift_bh, b, low):
    """out_t = relu(sum of value_v[j] x table_rt[row_v[j]] * scale + shift), these from scale_bh[b, low:]."""
    _check((out_t, _ONE), (table_rt, _TWO), (row_v, _ROWS), (value_v, _ONE))
    _check((scale_bh, _TWO), (shift_bh, _TWO))
    size = types.intp
    given = (out_t, table_rt, row_v, value_v, size, size, scale_bh, shift_bh, size, size)
    return types.void(*given), _rectified_lanes


@_emitted
def add_few(_context, sum_lf, tile, x_t, table_tf):
    """sum_lf[tile] += x_t table_tf, a product of 64 numbers and a (64, 16) table."""
    _check((sum_lf, _TWO), (x_t, _ONE), (table_tf, _TWO))
    return types.void(sum_lf, types.intp, x_t, table_tf), _add_few


def _check(*arrays: tuple[Any, tuple[Any, int]]) -> None:
    for array, wanted in arrays:
        assert isinstance(array, types.Array), array
        assert (array.dtype, array.ndim) == wanted, array
        assert array.layout == "C", array


def _add_lanes(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    sum_h, table_rh, row_v, value_v = _arrays(context, builder, signature, values)
    _, low, _, _, _, start, stop = values
    begin = _load(builder, sum_h.data, low, LANES)
    total = _summed(builder, begin, table_rh, low, row_v, value_v, start, stop)
    _store(builder, total, sum_h.data, low)
    return context.get_dummy_value()


def _rectified_lanes(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    out_t, table_rt, row_v, value_v, scale_bh, shift_bh = _arrays(context, builder, signature, values)
    start, stop, b, low = values[4], values[5], values[8], values[9]
    zero = ir.Constant(_vector(LANES), None)
    total = _summed(builder, zero, table_rt, ir.Constant(_I64, 0), row_v, value_v, start, stop)
    scale, shift = (
        _load(builder, table.data, _place(builder, table, b, low), LANES) for table in (scale_bh, shift_bh)
    )
    unit = _add_product(builder, shift, total, scale)
    unit = builder.select(builder.fcmp_ordered("<", unit, zero), zero, unit)  # NaN stays NaN
    _store(builder, unit, out_t.data, ir.Constant(_I64, 0))
    return context.get_dummy_value()


def _add_few(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    sum_lf, x_t, table_tf = _arrays(context, builder, signature, values)
    # four sums, none of which waits for another
    parts = [cgutils.alloca_once_value(builder, ir.Constant(_vector(FEW), None)) for _ in range(4)]
    with cgutils.for_range(builder, ir.Constant(_I64, LANES // 4)) as loop:
        for q, part in enumerate(parts):
            c = builder.add(loop.index, ir.Constant(_I64, q * LANES // 4))
            x = _repeated(builder, builder.load(builder.gep(x_t.data, [c])), FEW)
            row = _load(builder, table_tf.data, builder.mul(c, ir.Constant(_I64, FEW)), FEW)
            builder.store(_add_product(builder, builder.load(part), x, row), part)
    a, b, c, d = (builder.load(part) for part in parts)
    place = builder.mul(values[1], ir.Constant(_I64, FEW))
    total = builder.fadd(builder.fadd(a, b), builder.fadd(c, d))
    _store(builder, builder.fadd(_load(builder, sum_lf.data, place, FEW), total), sum_lf.data, place)
    return context.get_dummy_value()


def _summed(
    builder: Any, begin: Any, table: Any, low: Any, row_v: Any, value_v: Any, start: Any, stop: Any
) -> Any:
    """begin + sum over j of value_v[j] x 64 lanes of the table's row row_v[j]."""
    sums = cgutils.alloca_once_value(builder, begin)
    with cgutils.for_range_slice(builder, start, stop, ir.Constant(_I64, 1)) as (j, _):
        row = builder.sext(builder.load(builder.gep(row_v.data, [j])), _I64)
        value = _repeated(builder, builder.load(builder.gep(value_v.data, [j])), LANES)
        weights = _load(builder, table.data, _place(builder, table, row, low), LANES)
        builder.store(_add_product(builder, builder.load(sums), value, weights), sums)
    return builder.load(sums)


# -- single instructions ---------------------------------------------------------------------------------


def _arrays(context: Any, builder: Any, signature: Any, values: Any) -> list[Any]:
    return [
        context.make_array(kind)(context, builder, value)
        for kind, value in zip(signature.args, values, strict=True)
        if isinstance(kind, types.Array)
    ]


def _vector(lanes: int) -> Any:
    return ir.VectorType(ir.FloatType(), lanes)


def _place(builder: Any, table: Any, row: Any, column: Any) -> Any:
    return builder.add(builder.mul(row, builder.extract_value(table.shape, 1)), column)


def _load(builder: Any, data: Any, place: Any, lanes: int) -> Any:
    value = builder.load(builder.bitcast(builder.gep(data, [place]), _vector(lanes).as_pointer()))
    value.align = 4  # that of float32: rows begin anywhere
    return value


def _store(builder: Any, value: Any, data: Any, place: Any) -> None:
    pointer = builder.bitcast(builder.gep(data, [place]), value.type.as_pointer())
    builder.store(value, pointer).align = 4


def _repeated(builder: Any, number: Any, lanes: int) -> Any:
    undefined = ir.Constant(_vector(lanes), ir.Undefined)
    first = builder.insert_element(undefined, number, _I32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes))


def _add_product(builder: Any, total: Any, a: Any, b: Any) -> Any:
    return builder.fadd(total, builder.fmul(a, b, flags=_FUSED), flags=_FUSED)
