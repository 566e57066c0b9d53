"""Colours that the field draws its labels in: one table per data set, and a colour map for any number of classes."""

Colour = tuple[int, int, int]
Palette = tuple[Colour, ...]


def default_palette(num_classes: int) -> Palette:
    """Return PASCAL VOC's colour map for labels 0 to `num_classes` - 1: black first, neighbours easy to tell apart.

    The three low bits of a label become the top bits of red, green and blue, the next three the bits below, and so on;
    so any count up to 2^24 gets distinct colours, and VOC's own 21 (and the void label 255) get the official ones.

    >>> default_palette(3)
    ((0, 0, 0), (128, 0, 0), (0, 128, 0))
    """
    return tuple(_interleaved_bits(label) for label in range(num_classes))


def _interleaved_bits(label: int) -> Colour:
    red = green = blue = 0
    for bit in range(7, -1, -1):
        red |= (label & 1) << bit
        green |= (label >> 1 & 1) << bit
        blue |= (label >> 2 & 1) << bit
        label >>= 3
    return red, green, blue


def _from_hex(colours: str) -> Palette:
    return tuple((int(one[:2], 16), int(one[2:4], 16), int(one[4:], 16)) for one in colours.split())


CITYSCAPES = _from_hex(
    """
    804080 f423e8 464646 66669c be9999 999999 faaa1e dcdc00 6b8e23 98fb98 4682b4 dc143c ff0000 00008e 000046 003c64
    005064 0000e6 770b20
    """
)
"""The 19 evaluated classes in `trainId` order, colours of the Cityscapes label table (rrggbb)."""

CAMVID = _from_hex("808080 800000 c0c080 804080 3c28de 808000 c08080 404080 400080 404000 0080c0")
"""The 11 classes of the SegNet version of CamVid."""

ADE20K = _from_hex(
    """
    787878 b47878 06e6e6 503232 04c803 787850 8c8c8c cc05ff e6e6e6 04fa07 e005ff ebff07 96053d 787846 08ff33
    ff0652 8fff8c ccff04 ff3307 cc4603 0066c8 3de6fa ff0633 0b66ff ff0747 ff09e0 0907e6 dcdcdc ff095c 7009ff
    08ffd6 07ffe0 ffb806 0aff47 ff290a 07ffff e0ff08 6608ff ff3d06 ffc207 ff7a08 00ff14 ff0829 ff0599 0633ff
    eb0cff a09614 00a3ff 8c8c8c fa0a0f 14ff00 1fff00 ff1f00 ffe000 99ff00 0000ff ff4700 00ebff 00adff 1f00ff
    0bc8c8 ff5200 00fff5 003dff 00ff70 00ff85 ff0000 ffa300 ff6600 c2ff00 008fff 33ff00 0052ff 00ff29 00ffad
    0a00ff adff00 00ff99 ff5c00 ff00ff ff00f5 ff0066 ffad00 ff0014 ffb8b8 001fff 00ff3d 0047ff ff00cc 00ffc2
    00ff52 000aff 0070ff 3300ff 00c2ff 007aff 00ffa3 ff9900 00ff0a ff7000 8fff00 5200ff a3ff00 ffeb00 08b8aa
    8500ff 00ff5c b800ff ff001f 00b8ff 00d6ff ff0070 5cff00 00e0ff 70e0ff 46b8a0 a300ff 9900ff 47ff00 ff00a3
    ffcc00 ff008f 00ffeb 85ff00 ff00eb f500ff ff007a fff500 0abed4 d6ff00 00ccff 1400ff ffff00 0099ff 0029ff
    00ffcc 2900ff 29ff00 ad00ff 00f5ff 4700ff 7a00ff 00ffb8 005cff b8ff00 0085ff ffd600 19c2c2 66ff00 5c00ff
    """
)
"""The 150 classes of the scene-parsing benchmark; colours 6 and 48 are the same in the original, too."""
