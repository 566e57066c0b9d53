"""Pillow's bilinear resize of a part of an image, mirrored and padded, compiled by numba: the same pixels, bit for bit.

Pillow widens RGB to four bytes a pixel, resizes, and narrows again: three copies beside the arithmetic. This writes the crop
at once with the same arithmetic. Importing the module compiles it, or loads numba's cache; it raises ImportError
where numba is not installed and RuntimeError where it finds no folder for its cache.
"""

import numba
import numpy as np

_BITS = np.int32(22)
_HALF = np.int32(1 << 21)
_BYTE, _8, _16 = (np.uint32(number) for number in (255, 8, 16))
_1, _2, _3 = (np.uintp(offset) for offset in range(1, 4))  # unsigned: no check for indices that count from the end

_IMAGE_TYPE = numba.types.Array(numba.uint8, 3, "C")
_READ_ONLY = numba.types.Array(numba.uint8, 3, "C", readonly=True)  # takes others, too
_STARTS, _WEIGHTS = numba.int32[::1], numba.int32[:, ::1]


@numba.njit((numba.int64, numba.float64, numba.float64, numba.int64), cache=True, nogil=True)
def taps(size, start, step, count):  # type: ignore[no-untyped-def]
    """Return first source pixel and fixed-point weights of `count` outputs, each of `step` pixels of a side of `size` pixels.

    The weights are outputs x taps, in units of 2^-22 (Pillow's 32 bits less 8 for the pixel and 2 for the sign and an
    overshoot; Resample.c), zero where an output has fewer taps; no tap lies outside the side.
    """
    reach = max(1.0, step)  # antialiasing: a smaller image averages over what it leaves out
    low, high = np.empty(count, np.int64), np.empty(count, np.int64)
    for n in range(count):
        centre = start + (n + 0.5) * step
        low[n], high[n] = max(np.int64(centre - reach + 0.5), 0), min(np.int64(centre + reach + 0.5), size)
    most = (high - low).max()
    starts, weights, fractions = np.empty(count, np.int32), np.zeros((count, most), np.int32), np.empty(most)
    for n in range(count):
        first, centre, total = min(low[n], size - most), start + (n + 0.5) * step, 0.0
        starts[n] = first  # the last outputs begin with weights of zero instead of ending with them
        for tap in range(most):
            distance = abs((first + tap - centre + 0.5) * (1.0 / reach))
            fractions[tap] = max(0.0, 1.0 - distance) if first + tap < high[n] else 0.0
            total += fractions[tap]  # in Pillow's order: a sum of floats depends on it
        for tap in range(most):
            weights[n, tap] = np.int32(0.5 + fractions[tap] / total * (1 << 22))
    return starts, weights


@numba.njit(
    (_READ_ONLY, numba.int32, _STARTS, _WEIGHTS, _STARTS, _WEIGHTS, numba.boolean, numba.uint8[::1], _IMAGE_TYPE),
    cache=True,
    nogil=True,
)
def resample_into(  # type: ignore[no-untyped-def]
    image_HWC, first_column, column_starts, column_weights, row_starts, row_weights, flip, fill, out_HWC
):
    """Write the window into the top left corner of `out_HWC`, and `fill` (RGB) everywhere else.

    Each loop over columns does one thing. Loops over neighbours in memory become vector instructions; one that picks pixels
    from here and there does not, and would keep arithmetic in the same loop from it.
    """
    height, row_taps = row_weights.shape
    width, column_taps = column_weights.shape
    source = image_HWC.reshape(image_HWC.shape[0], image_HWC.shape[1] * 3)
    first, begin = row_starts[0], 3 * np.int64(first_column)
    between = np.empty((row_starts[height - 1] + row_taps - first, 3 * width), np.uint8)
    starts = column_starts[::-1].copy() if flip else column_starts
    weights_of_tap = (column_weights[::-1] if flip else column_weights).T.copy()
    pixels, picked = np.empty(column_starts[width - 1] + column_taps, np.uint32), np.empty(width, np.uint32)
    red, green, blue = np.empty(width, np.int32), np.empty(width, np.int32), np.empty(width, np.int32)
    for y in range(between.shape[0]):
        line = source[first + y, begin : begin + 3 * pixels.shape[0]]
        for x in range(pixels.shape[0]):
            at = _3 * np.uintp(x)
            pixels[x] = np.uint32(line[at]) | np.uint32(line[at + _1]) << _8 | np.uint32(line[at + _2]) << _16
        red[:], green[:], blue[:] = _HALF, _HALF, _HALF
        for tap in range(column_taps):
            weights = weights_of_tap[tap]
            for x in range(width):
                picked[x] = pixels[np.uintp(starts[x] + tap)]
            for x in range(width):
                red[x] += weights[x] * np.int32(picked[x] & _BYTE)
                green[x] += weights[x] * np.int32(picked[x] >> _8 & _BYTE)
                blue[x] += weights[x] * np.int32(picked[x] >> _16)
        line = between[y]
        for x in range(width):
            at = _3 * np.uintp(x)
            line[at], line[at + _1], line[at + _2] = red[x] >> _BITS, green[x] >> _BITS, blue[x] >> _BITS
    out = out_HWC.reshape(out_HWC.shape[0], out_HWC.shape[1] * 3)
    total = np.empty(3 * width, np.int32)
    for y in range(height):
        total[:] = _HALF
        for tap in range(row_taps):
            weight, line = row_weights[y, tap], between[row_starts[y] - first + tap]
            for i in range(3 * width):
                total[i] += weight * np.int32(line[i])
        line = out[y]
        for i in range(3 * width):
            line[i] = total[i] >> _BITS
    for y in range(out_HWC.shape[0]):
        for x in range(width if y < height else 0, out_HWC.shape[1]):
            for channel in range(3):
                out_HWC[y, x, channel] = fill[channel]
