"""Small files that claim, or become, far more than they are; read in a process of their own that may not grow.

`python image_bombs.py` reads them all and prints a JSON line for each: seconds, memory, and how it ended.
"""

import dataclasses
import json
import struct
import tempfile
from pathlib import Path

from fuzz.contract import Target, limited_memory, the_watch
from image_attacks import ENTRANCES, PHOTO, chunk, common_files, directory, patched, png, saved, tiff, zeros
from PIL import Image

from deeplabzoo.data.image_io import read_image
from deeplabzoo.inference.large_image import open_row_reader

STATED_BYTES_A_PIXEL = 20
"""Memory stated for a picture that is read, by pixel of its limit."""
WITHIN = 16_000_000
"""Pixels of those that are within the limit and are read."""
LIMIT_MEBIBYTES = 2048
"""Address space that the process may take beyond its libraries."""


def gigapixels() -> dict[str, bytes]:
    """Headers that claim more pixels than anybody has, in every format whose header can be written by hand."""
    files = common_files()
    huge = struct.pack("<HH", 65535, 65535)
    jpeg = files["jpeg"]
    frame = jpeg.index(b"\xff\xc0") + 5
    one_strip = {256: (4, 1, 10**6), 257: (4, 1, 10**6), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 273: (4, 1, 8)}
    size_of_jp2 = files["jp2"].index(b"ihdr") + 4
    size_of_webp = files["webp"].index(b"\x9d\x01\x2a") + 3
    inner = png(60_000, 60_000, data=bytes(1000))
    return {
        "png": png(2**31 - 1, 2**31 - 1),
        "png of one bit": png(2**31 - 1, 1000, bits=1, colours=0),
        "gif": patched(files["gif"], 6, huge),
        "bmp": patched(files["bmp"], 18, struct.pack("<ii", 2**31 - 1, 2**31 - 1)),
        "bmp upside down": patched(files["bmp"], 18, struct.pack("<ii", 10**6, -(10**6))),
        "jpeg": patched(jpeg, frame, struct.pack(">HH", 65500, 65500)),
        "tiff": directory({**one_strip, 278: (4, 1, 10**6), 279: (4, 1, 4)}),
        "tiff of rows": directory({**one_strip, 278: (4, 1, 1), 279: (4, 1, 4)}),
        "tiff of 2^32": directory({**one_strip, 256: (4, 1, 2**32 - 1), 257: (4, 1, 2**32 - 1), 279: (4, 1, 4)}),
        "webp": patched(files["webp"], size_of_webp, struct.pack("<HH", 16383, 16383)),
        "jp2": patched(files["jp2"], size_of_jp2, struct.pack(">II", 2**31 - 1, 2**31 - 1)),
        "ico that holds a png": _icon(inner),
        "icns that holds a png": _boxed(b"icns", _boxed(b"ic09", inner)),
    }


def growing() -> dict[str, bytes]:
    """Files whose metadata, scans, pages or segments become large or take long, while their picture is small."""
    text = zeros(2**28)
    pages = [directory({256: (3, 1, 2), 257: (3, 1, 2), 258: (3, 1, 8), 262: (3, 1, 1), 273: (4, 1, 0), 279: (4, 1, 4)})]
    first = len(pages[0])
    chain = b"".join(struct.pack("<HI", 0, first + 6 * (one + 1)) for one in range(50_000)) + bytes(6)
    scans = saved(Image.new("L", (900, 900), 128), "JPEG", progressive=True)
    last = scans.rindex(b"\xff\xda")
    tile = zeros(2**29)
    bomb = tiff(PHOTO, tile=(16, 16), compression="zlib", photometric="rgb")
    offset, count = _tag(bomb, 324), _tag(bomb, 325)
    tiles = patched(patched(bomb, offset, struct.pack("<I", len(bomb))), count, struct.pack("<I", len(tile))) + tile
    return {
        "png of a long compressed text": png(8, 8, extra=chunk(b"zTXt", b"a\0\0" + text), data=bytes(8 * 25)),
        "png of a long compressed profile": png(8, 8, extra=chunk(b"iCCP", b"a\0\0" + text), data=bytes(8 * 25)),
        "png of many texts": png(8, 8, extra=chunk(b"tEXt", b"a\0b") * 50_000, data=bytes(8 * 25)),
        "png with too much data": png(8, 8, data=bytes(2**26)),
        "tiff of 50 000 pages": patched(pages[0], first - 4, struct.pack("<I", first)) + chain,
        "tiff whose page follows itself": patched(pages[0], first - 4, struct.pack("<I", 8)),
        "tiff of a tile that inflates": tiles,
        "jpeg of 20 000 scans": scans[:-2] + scans[last:-2] * 20_000 + b"\xff\xd9",
        "gif of 30 000 frames": _many_frames(),
    }


def within() -> dict[str, bytes]:
    """Pictures of a few kilobytes that are as large as the limit allows: read, at the memory that is stated."""
    side = int(WITHIN**0.5)
    rows = {2: 3 * side + 1, 6: 4 * side + 1, 4: 2 * side + 1, 3: side + 1}
    palette = chunk(b"PLTE", bytes(768)) + chunk(b"tRNS", bytes(256))
    files = {
        f"png of colour type {kind}": png(side, side, colours=kind, extra=palette if kind == 3 else b"", data=bytes(side * row))
        for kind, row in rows.items()
    }
    turned = Image.Exif()
    turned[0x0112] = 6
    flat = Image.new("RGB", (side, side))
    return {
        **files,
        "png of 16 bits": png(side, side, colours=0, bits=16, data=bytes(side * (2 * side + 1))),
        "jpeg in scans, turned": saved(flat, "JPEG", progressive=True, exif=turned),
        "webp": saved(flat, "WEBP"),
        "gif": saved(flat.convert("P"), "GIF"),
        "jp2": saved(flat, "JPEG2000"),
        "avif": saved(flat, "AVIF", speed=10),
        "tiff deflated": saved(flat, "TIFF", compression="tiff_adobe_deflate"),
        "cmyk": saved(Image.new("CMYK", (side, side)), "TIFF", compression="tiff_adobe_deflate"),
    }


def _tag(file: bytes, tag: int) -> int:
    """Where the value of a tag with one value stands in a little-endian TIFF."""
    (at,) = struct.unpack_from("<I", file, 4)
    (entries,) = struct.unpack_from("<H", file, at)
    return next(at + 2 + 12 * one + 8 for one in range(entries) if struct.unpack_from("<H", file, at + 2 + 12 * one)[0] == tag)


def _icon(picture: bytes) -> bytes:
    """An ICO of one entry that says 16 x 16, whatever the picture in it says."""
    return b"\0\0\1\0\1\0" + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(picture), 22) + picture


def _boxed(kind: bytes, content: bytes) -> bytes:
    return kind + struct.pack(">I", 8 + len(content)) + content


def _many_frames() -> bytes:
    one = saved(Image.new("P", (4, 4)), "GIF")
    begin = one.index(b",")
    return one[:begin] + one[begin:-1] * 30_000 + b";"


def _targets(kind: str) -> list[Target]:
    if kind == "within":
        stated = STATED_BYTES_A_PIXEL * WITHIN >> 20
        return [dataclasses.replace(ENTRANCES["photo"], parse=_at_the_limit, seconds=60, mebibytes=stated)]
    unlimited = dataclasses.replace(ENTRANCES["windows"], name="windows without a limit", parse=_first_rows)
    return [*ENTRANCES.values(), unlimited]


def _at_the_limit(path: Path) -> object:
    return read_image(path, max_pixels=WITHIN)


def _first_rows(path: Path) -> object:
    return open_row_reader(path).rows(0, 16)


def main() -> None:
    """Read every bomb through every entrance, and print what became of each."""
    watch = the_watch()
    with tempfile.TemporaryDirectory() as folder:
        for target in ENTRANCES.values():
            watch.run(target, common_files()["png"], Path(folder))  # imports and tables, once
        with limited_memory(LIMIT_MEBIBYTES):
            for kind, files in (("gigapixels", gigapixels()), ("growing", growing()), ("within", within())):
                for name, data in files.items():
                    for target in _targets(kind):
                        broken = watch.run(target, data, Path(tempfile.mkdtemp(dir=folder)))
                        logged = "" if watch.outcome is None else str(watch.outcome)
                        line = {"kind": kind, "file": name, "entrance": target.name, "bytes": len(data), "sentence": logged}
                        print(json.dumps({**line, "broken": None if broken is None else broken.what}), flush=True)


if __name__ == "__main__":
    main()
