"""`python -m tools.docs.stride_images`: one network at output strides 8, 16 and 32 on one photo, as pictures.

For docs/output_stride.md: the cells that the encoder sees laid over the photo, and the labels that come of them.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import deeplabzoo
from deeplabzoo.data.image_io import Labels, Pixels, read_image
from deeplabzoo.files import ensure_folder, write_atomically
from deeplabzoo.inference.predictor import Predictor
from deeplabzoo.inference.visualization import LEGEND_BACKGROUND, LEGEND_TEXT, blend
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.models.layers import aspp_rates
from tools.docs.small_images import write_jpeg
from tools.docs.tables import replace_block

BLOCK = "stride-table"
STRIDES = (8, 16, 32)
_MODEL = "deeplabv3plus_mobilenetv2_voc"
_GRID = (255, 255, 255)


@dataclass(frozen=True, eq=False)
class StrideResult:
    """What the network made of the photo at one output stride."""

    stride: int
    rates: tuple[int, ...]
    cells_hw: tuple[int, int]
    """Of the encoder's last map, for the network's input."""
    labels: Labels


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the pictures and write the table into the document."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.docs.stride_images",
        description="One network at output strides 8, 16 and 32 on one photo.",
    )
    parser.add_argument("--photo", type=Path, default=Path("docs/images/cat.jpg"), help="the photo (docs/images/cat.jpg)")
    parser.add_argument("--write", type=Path, default=Path("docs/output_stride.md"), metavar="DOCUMENT", help="with the block")
    args = parser.parse_args(argv)
    net = deeplabzoo.create(_MODEL, pretrained=True)
    photo = read_image(args.photo)
    found = [predict_at_stride(net, photo, stride) for stride in STRIDES]
    images = args.write.parent / "images"
    ensure_folder(images)
    for one in found:
        write_jpeg(draw_cell_grid(net, photo, one), images / f"stride_{one.stride}.jpg")
    text = replace_block(args.write, table(found), BLOCK)
    write_atomically(args.write, lambda file: file.write(text.encode()))
    return 0


def predict_at_stride(net: DeepLab, image: Pixels, stride: int) -> StrideResult:
    """Run the network, whose weights stay the same, at `stride`."""
    net.set_output_stride(stride)
    labels = Predictor(net, device="cpu", engine="torch")(image).labels
    height, width = net.preprocessing.size
    return StrideResult(
        stride, net.config.atrous_rates or aspp_rates(stride), (-(-height // stride), -(-width // stride)), labels
    )


def draw_cell_grid(net: DeepLab, image: Pixels, one: StrideResult) -> Image.Image:
    """Return the photo with labels and, in its left half, the lines between the encoder's cells."""
    picture = Image.fromarray(blend(image, one.labels, net.classes, net.palette))
    factor = min(side / size for side, size in zip(net.preprocessing.size, image.shape[:2], strict=True))
    step = one.stride / factor  # a cell in pixels of the photo
    lines = Image.new("RGBA", picture.size)
    draw = ImageDraw.Draw(lines)
    half = picture.width // 2
    for x in np.arange(0, half, step):
        draw.line([(x, 0), (x, picture.height)], fill=(*_GRID, 130))
    for y in np.arange(0, picture.height, step):
        draw.line([(0, y), (half, y)], fill=(*_GRID, 130))
    picture = Image.alpha_composite(picture.convert("RGBA"), lines).convert("RGB")
    return _with_caption(picture, f"output stride {one.stride}: {one.cells_hw[1]} x {one.cells_hw[0]} cells")


def table(found: Sequence[StrideResult]) -> str:
    """Return the table of `found` as Markdown; agreement is with the stride that the weights were trained at, 16."""
    trained = next(one.labels for one in found if one.stride == 16)
    lines = ["| output stride | rates | cells for a photo of 513 x 513 | labels as at stride 16 |", "|---|---|---|---|"]
    for one in found:
        alike = 100 * float((one.labels == trained).mean())
        rates = ", ".join(map(str, one.rates))
        lines.append(f"| {one.stride} | {rates} | {one.cells_hw[1]} x {one.cells_hw[0]} | {alike:.1f} % |")
    return "\n".join(lines)


def _with_caption(image: Image.Image, text: str) -> Image.Image:
    sheet = Image.new("RGB", (image.width, image.height + 28), LEGEND_BACKGROUND)
    sheet.paste(image, (0, 0))
    ImageDraw.Draw(sheet).text((6, image.height + 14), text, LEGEND_TEXT, ImageFont.load_default(size=16), anchor="lm")
    return sheet


if __name__ == "__main__":
    sys.exit(main())
