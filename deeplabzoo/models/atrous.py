"""The arithmetic of output strides and atrous rates, in plain integers.

One rule holds everything together: a rate keeps its reach *in pixels of the image*. Halving the output stride doubles
every rate, so a network trained at stride 16 sees the same surroundings when it is run at stride 8 (DeepLabV3, section 3.3).
"""

from deeplabzoo.errors import UsageError

OUTPUT_STRIDES = (8, 16, 32)

_REACH_IN_PIXELS = 96
"""Reach of the smallest ASPP rate: 6 cells of 16 pixels (DeepLabV3, section 3.3); the others reach twice and thrice as far."""


def aspp_rates(output_stride: int) -> tuple[int, int, int]:
    """Return the three ASPP rates of the papers for an output stride of 8, 16 or 32.

    >>> aspp_rates(32), aspp_rates(16), aspp_rates(8)
    ((3, 6, 9), (6, 12, 18), (12, 24, 36))
    """
    if output_stride not in OUTPUT_STRIDES:
        raise UsageError(f"output_stride must be 8, 16 or 32, not {output_stride!r}.")
    unit = _REACH_IN_PIXELS // output_stride
    return unit, 2 * unit, 3 * unit


def scale_rates(rates: tuple[int, ...], from_stride: int, to_stride: int) -> tuple[int, ...]:
    """Return the rates that reach as far in pixels at `to_stride` as `rates` do at `from_stride`.

    Raises UsageError where a rate would become a fraction: rounding it would silently change what the network sees.

    >>> scale_rates((12, 24, 36), 16, 8)
    (24, 48, 72)
    """
    if any(rate * from_stride % to_stride for rate in rates):
        raise UsageError(
            f"Atrous rates {rates} at output stride {from_stride} have no whole equivalent at stride {to_stride}; "
            "build the network with atrous_rates given for that stride."
        )
    return tuple(rate * from_stride // to_stride for rate in rates)


def block_rates(multi_grid: tuple[int, ...], output_stride: int, blocks: int, *, halved: bool = False) -> tuple[int, ...]:
    """Return the dilation of every block of the last encoder stage: its unit rate times the stage's own dilation.

    The stage's own dilation is 32 / output_stride, as its stride was 32 before the network was made denser; unit rates
    repeat when the stage has more blocks than `multi_grid` has entries (DeepLabV3, section 3.2.1). `halved` takes half of it,
    as mmsegmentation's networks do; raises UsageError where that leaves a fraction.

    >>> block_rates((1, 2, 4), 16, 3), block_rates((1, 2, 4), 16, 3, halved=True)
    ((2, 4, 8), (1, 2, 4))
    """
    rates = tuple((32 // output_stride) * multi_grid[block % len(multi_grid)] for block in range(blocks))
    if halved and any(rate % 2 for rate in rates):
        raise UsageError(
            f"multi_grid {multi_grid} with multi_grid_halved has no whole dilations at output stride {output_stride}."
        )
    return tuple(rate // 2 for rate in rates) if halved else rates
