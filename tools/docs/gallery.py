"""`python -m tools.docs.gallery --out docs/gallery.md`: what the bundled models make of photos that may be shown.

Each model gets photos that are listed here with the reason why it gets them; a bundled model without any is said in the page.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import deeplabzoo
from deeplabzoo.data.classes import CLASS_LISTS
from deeplabzoo.data.image_io import read_image
from deeplabzoo.errors import UsageError
from deeplabzoo.files import ensure_folder, write_atomically
from deeplabzoo.hub.manifest import BundledSource, WeightRow
from deeplabzoo.hub.registry import list_weights
from deeplabzoo.inference.predictor import Predictor, Result
from tools.docs.small_images import write_jpeg, write_png


@dataclass(frozen=True)
class GalleryImage:
    """A photo beside the documents, and what is to be said of it."""

    file: str
    caption: str


GALLERY_IMAGES: Mapping[str, tuple[GalleryImage, ...]] = {
    "voc": (
        GalleryImage("cat.jpg", "A class of VOC, filling the picture."),
        GalleryImage("astronaut.jpg", "A person; the shuttle, which VOC has no name for, is taken for a bottle."),
    ),
    "person": (GalleryImage("astronaut.jpg", "A half-length portrait; it was trained on full-body photos."),),
    "camvid": (
        GalleryImage(
            "palace.jpg",
            "Not what it is made for: it knows streets seen from a car, and this is a hill by a lake. Sky and trees are found, "
            "the pavilion is taken for trees and a fence, and it has no name for the lake. Do not trust it with pictures that "
            "are unlike CamVid's.",
        ),
    ),
}
"""Class list of the weights -> photos in the folder of pictures; their licences stand in CREDITS.md there."""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page and its pictures; raises UsageError for a missing photo, OutputError."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.docs.gallery",
        description="Input, labels and overlay of every bundled model, as a page with pictures.",
    )
    parser.add_argument("--photos", type=Path, default=Path("docs/images"), help="folder of the photos (docs/images)")
    parser.add_argument("--out", type=Path, default=Path("docs/gallery.md"), help="the page; pictures go into gallery/ beside")
    args = parser.parse_args(argv)
    images = args.out.parent / "gallery"
    ensure_folder(images)
    rows = [row for row in list_weights() if isinstance(row.source, BundledSource)]
    text = page([section(row, args.photos, images) for row in rows])
    write_atomically(args.out, lambda file: file.write(text.encode()))
    return 0


def page(sections: Sequence[str]) -> str:
    """Return the page of these sections."""
    head = (
        "<!-- Written by `python -m tools.docs.gallery`; do not edit. -->\n# Gallery\n\nEvery bundled model on freely licensed "
        "photos ([credits](images/CREDITS.md)): the photo, the label map, and the overlay with the share of each class. They "
        "show typical results; for accuracy see the [measured mIoU](weights.md)."
    )
    return "\n\n".join([head, *sections]) + "\n"


def section(row: WeightRow, images: Path, pictures: Path) -> str:
    """Draw one model's pictures and return its part of the page."""
    parts = [f"## {row.full_name}", f"Classes: {', '.join(CLASS_LISTS[row.data].classes)}."]
    shown = GALLERY_IMAGES.get(row.data, ())
    if not shown:
        parts.append("No freely licensed photo of its kind is available; try it on your own images.")
        return "\n\n".join(parts)
    predictor = Predictor(deeplabzoo.create(row.full_name, pretrained=True), device="cpu", engine="torch")
    for one in shown:
        if not (images / one.file).is_file():
            raise UsageError(f"The photo '{images / one.file}' is missing; --photos names the folder that holds it.")
        parts += _images_markdown(one, predictor(read_image(images / one.file)), row, pictures)
    return "\n\n".join(parts)


def _images_markdown(one: GalleryImage, result: Result, row: WeightRow, images: Path) -> Iterator[str]:
    stem = f"{row.full_name}_{Path(one.file).stem}"
    write_png(result.label_image(), images / f"{stem}_labels.png")
    write_jpeg(result.overlay(), images / f"{stem}_overlay.jpg")
    found = ", ".join(area.name for area in result.found()[:3])
    yield one.caption
    yield "| photo | labels | overlay |\n|---|---|---|\n" + "| {} | {} | {} |".format(
        f"![{Path(one.file).stem}](images/{one.file})",
        f"![Labels: {found}](gallery/{stem}_labels.png)",
        f"![Overlay: {found}](gallery/{stem}_overlay.jpg)",
    )


if __name__ == "__main__":
    sys.exit(main())
