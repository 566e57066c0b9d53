"""Pillow's bilinear resize of a part of a picture, mirrored and padded, compiled by numba: the same pixels, bit for bit.

Pillow widens RGB to four bytes a pixel, resizes, and narrows again: three copies beside the arithmetic. This writes the crop
at once with the arithmetic of `resize.taps`. Importing the module compiles it, or loads numba's cache; it raises ImportError
where numba is not installed and RuntimeError where it finds no folder for its cache.
"""

import numba
import numpy as np

_BITS = np.int32(22)
_HALF = np.int32(1 << 21)
_1, _2, _3, _4, _5 = (np.uintp(offset) for offset in range(1, 6))  # unsigned: no check for indices that count from the end

_PICTURE = numba.types.Array(numba.uint8, 3, "C")
_READ_ONLY = numba.types.Array(numba.uint8, 3, "C", readonly=True)  # takes others, too
_STARTS, _WEIGHTS = numba.int32[::1], numba.int32[:, ::1]


@numba.njit(
    (_READ_ONLY, numba.int32, _STARTS, _WEIGHTS, _STARTS, _WEIGHTS, numba.boolean, numba.uint8[::1], _PICTURE),
    cache=True,
    nogil=True,
)
def resample_into(  # type: ignore[no-untyped-def]
    image_HWC, first_column, column_starts, column_weights, row_starts, row_weights, flip, fill, out_HWC
):
    """Write the window into the top left corner of `out_HWC`, and `fill` (RGB) everywhere else."""
    height, row_taps = row_weights.shape
    width, column_taps = column_weights.shape
    source = image_HWC.reshape(image_HWC.shape[0], image_HWC.shape[1] * 3)
    first = row_starts[0]
    between = np.empty((row_starts[height - 1] + row_taps - first, 3 * width), np.uint8)
    for y in range(between.shape[0]):
        pixels, line = source[first + y], between[y]
        for j in range(width):
            x = width - 1 - j if flip else j
            at, to = _3 * np.uintp(first_column + column_starts[x]), _3 * np.uintp(j)
            if column_taps == 2:  # every enlargement
                left, right = column_weights[x, 0], column_weights[x, 1]
                line[to] = np.int32(_HALF + left * np.int32(pixels[at]) + right * np.int32(pixels[at + _3])) >> _BITS
                line[to + _1] = np.int32(_HALF + left * np.int32(pixels[at + _1]) + right * np.int32(pixels[at + _4])) >> _BITS
                line[to + _2] = np.int32(_HALF + left * np.int32(pixels[at + _2]) + right * np.int32(pixels[at + _5])) >> _BITS
            else:
                red, green, blue = _HALF, _HALF, _HALF
                for tap in range(column_taps):
                    weight = column_weights[x, tap]
                    red = np.int32(red + weight * np.int32(pixels[at]))
                    green = np.int32(green + weight * np.int32(pixels[at + _1]))
                    blue = np.int32(blue + weight * np.int32(pixels[at + _2]))
                    at += _3
                line[to], line[to + _1], line[to + _2] = red >> _BITS, green >> _BITS, blue >> _BITS
    out = out_HWC.reshape(out_HWC.shape[0], out_HWC.shape[1] * 3)
    total = np.empty(3 * width, np.int32)
    for y in range(height):  # these loops run over neighbours in memory: the compiler makes vector instructions of them
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
