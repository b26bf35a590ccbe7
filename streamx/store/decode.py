"""From the bytes of chunks to rows in their place: the one inner loop of reading, without the GIL.

It calls two C functions that other packages ship: the decoder of numcodecs (c-blosc) and the checksum of
google-crc32c. They are looked up and tried once; where one can't be found (other builds, other systems)
:func:`available` is False, and zarr reads instead.
"""

from __future__ import annotations

import ctypes
import glob
import os
from functools import cache
from typing import Any

import google_crc32c
import numpy as np
from llvmlite import binding
from numba import types

from streamx.compiled import compiled

READ_AHEAD = 1 << 18  # bytes read at once: what comes next is still in the processor's cache when decoded
CHECKSUM = 4
# What a kernel may answer; `k * N_ERRORS + error` says at which chunk.
DAMAGED, CUT_SHORT, UNDECODED, N_ERRORS = 1, 2, 3, 4
WHAT = {
    DAMAGED: "a chunk's bytes are not those that were written",
    CUT_SHORT: "object is cut short",
    UNDECODED: "a chunk can't be decoded",
}

_BLOSC, _CRC32C, _PREAD = "streamx_blosc_decompress_ctx", "streamx_crc32c_value", "streamx_pread"
_blosc: Any = types.ExternalFunction(_BLOSC, types.int32(types.uintp, types.uintp, types.uintp, types.int32))
_crc32c: Any = types.ExternalFunction(_CRC32C, types.uint32(types.uintp, types.uintp))
_pread: Any = types.ExternalFunction(_PREAD, types.intp(types.int32, types.uintp, types.uintp, types.int64))


@cache
def available() -> bool:
    """Whether the decoder and the checksum are there and do what they should."""
    try:
        import numcodecs.blosc as blosc

        beside = os.path.join(os.path.dirname(google_crc32c.__file__), os.pardir, "google_crc32c.libs")
        (crc32c,) = glob.glob(os.path.join(beside, "libcrc32c*"))
        for name, library, symbol in (
            (_BLOSC, blosc.__file__, "blosc_decompress_ctx"),
            (_CRC32C, crc32c, "crc32c_value"),
            (_PREAD, None, "pread"),
        ):
            function = getattr(ctypes.CDLL(library), symbol)
            binding.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)
        values = np.arange(1000, dtype=np.uint16)
        body = blosc.compress(values, b"lz4", 5, blosc.BITSHUFFLE)
        frame = np.frombuffer(body + google_crc32c.value(body).to_bytes(4, "little"), np.uint8)
        found = np.empty_like(values)
        whole = decode_chunk(frame, True, False, True, found) == 0 and bool((found == values).all())
        changed = frame.copy()
        changed[-1] ^= 1
        return whole and decode_chunk(changed, True, False, True, found) == DAMAGED
    except (ImportError, OSError, ValueError, AttributeError):
        return False


@compiled
def decode_chunk(frame, compressed, delta, verify, scratch):
    """The values of one chunk from its bytes and their checksum; 0, or an error. No bytes stand for zeros."""
    if frame.size == 0:
        scratch[:] = 0
        return 0
    n = frame.size - CHECKSUM
    if n < 0:
        return DAMAGED
    if verify and _crc32c(frame.ctypes.data, n) != _uint32(frame[n:]):
        return DAMAGED
    if compressed:
        # the frame's own length is all that keeps the decoder from reading beyond it
        if n < 16 or _uint32(frame[12:]) != n:
            return UNDECODED
        if _blosc(frame.ctypes.data, scratch.ctypes.data, scratch.nbytes, 1) != scratch.nbytes:
            return UNDECODED
    else:
        if n != scratch.nbytes:
            return UNDECODED
        scratch.view(np.uint8)[:] = frame[:n]
    if delta:
        for k in range(1, scratch.size):
            scratch[k] += scratch[k - 1]
    return 0


@compiled
def _uint32(four):
    """Little endian."""
    value = np.uint32(0)
    for k in range(4):
        value |= np.uint32(four[k]) << np.uint32(8 * k)
    return value


@compiled
def _frame(frames_k3, k, window, buffer, given):
    """The bytes of chunk k: from what was read last, from the file, or from `given`; and an error, or 0.

    `window` is what `buffer` holds: descriptor, first byte, last. Chunks that follow each other in a file are
    read together, as many as the buffer holds.
    """
    descriptor, first, size = frames_k3[k]
    if descriptor < 0:
        return given[first : first + size], 0
    if descriptor != window[0] or first < window[1] or first + size > window[2]:
        stop = first + size
        for follower in range(k + 1, len(frames_k3)):
            _, begin, more = frames_k3[follower]
            if frames_k3[follower, 0] != descriptor or begin != stop or stop + more - first > buffer.size:
                break
            stop += more
        if _pread(descriptor, buffer.ctypes.data, stop - first, first) != stop - first:
            return buffer[:0], CUT_SHORT
        window[0], window[1], window[2] = descriptor, first, stop
    at = first - window[1]
    return buffer[at : at + size], 0


@compiled
def place_chunks(
    number_k, frames_ik3, frames_dk3, given, buffer_bytes, chunk, coding_i, coding_d, verify,
    start_n, stop_n, at_n, scratch_i, scratch_d, indices, data, as_stored,
):  # fmt: skip
    """Decode chunks of two arrays on one grid and put every row's values in place.

    A chunk that lies in one row (or in a run of rows that is given as one) is decoded where it belongs.

    Parameters
    ----------
    number_k
        Chunk numbers, ascending: all that the rows' values lie in.
    frames_ik3, frames_dk3
        Where the bytes of each lie: (descriptor, first byte, bytes); descriptor -1 means in `given`.
    buffer_bytes
        Read at once from a descriptor; no frame is longer.
    coding_i, coding_d
        (is compressed, is delta) of each array.
    start_n, stop_n
        Values of each row in the arrays, ascending and disjoint.
    at_n
        Where its first value goes in `indices` and `data`; -1 leaves the row out.
    scratch_i, scratch_d
        One chunk in the stored dtypes.
    as_stored
        (`indices` has the stored dtype, `data` has).

    Returns
    -------
    0, or k * N_ERRORS + error, with 2 k for the indices and 2 k + 1 for the data of chunk ``number_k[k]``.
    """
    window_i, window_d = np.full(3, -1, np.int64), np.full(3, -1, np.int64)
    buffer_i, buffer_d = np.empty(buffer_bytes, np.uint8), np.empty(buffer_bytes, np.uint8)
    row, n_rows = 0, len(start_n)
    for k in range(len(number_k)):
        first = number_k[k] * chunk
        whole = row < n_rows and start_n[row] <= first and stop_n[row] >= first + chunk and at_n[row] >= 0
        at = at_n[row] + first - start_n[row] if whole else 0
        straight_i, straight_d = whole and as_stored[0], whole and as_stored[1]
        frame, error = _frame(frames_ik3, k, window_i, buffer_i, given)
        if straight_i:
            error = error or decode_chunk(frame, coding_i[0], coding_i[1], verify, indices[at : at + chunk])
        else:
            error = error or decode_chunk(frame, coding_i[0], coding_i[1], verify, scratch_i)
        if error:
            return 2 * k * N_ERRORS + error
        frame, error = _frame(frames_dk3, k, window_d, buffer_d, given)
        if straight_d:
            error = error or decode_chunk(frame, coding_d[0], coding_d[1], verify, data[at : at + chunk])
        else:
            error = error or decode_chunk(frame, coding_d[0], coding_d[1], verify, scratch_d)
        if error:
            return (2 * k + 1) * N_ERRORS + error
        if not straight_i:
            _place(row, n_rows, scratch_i, first, start_n, stop_n, at_n, indices)
        if not straight_d:
            _place(row, n_rows, scratch_d, first, start_n, stop_n, at_n, data)
        while row < n_rows and stop_n[row] <= first + chunk:
            row += 1
    return 0


@compiled
def place(row, n_rows, values_i, values_d, first, start_n, stop_n, at_n, indices, data):
    """Put in place what a stretch of both arrays, from value `first` on, holds of the rows from `row` on."""
    _place(row, n_rows, values_i, first, start_n, stop_n, at_n, indices)
    _place(row, n_rows, values_d, first, start_n, stop_n, at_n, data)


@compiled
def _place(row, n_rows, values, first, start_n, stop_n, at_n, out):
    end = first + values.size
    while row < n_rows and start_n[row] < end:
        low, high = max(start_n[row], first), min(stop_n[row], end)
        n = high - low
        if at_n[row] >= 0 and n > 0:
            at, source = at_n[row] + low - start_n[row], low - first
            # slices of known length: the compiler makes wide moves of this loop
            target, stored = out[at : at + n], values[source : source + n]
            for j in range(n):
                target[j] = stored[j]
        row += 1
