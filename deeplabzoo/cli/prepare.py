"""`python -m deeplabzoo.prepare voc|trainaug|folder --root DIR`: download training data, or check a folder of your own."""

from collections.abc import Sequence
from pathlib import Path

from deeplabzoo.cli.parser import Parser, run
from deeplabzoo.errors import DataError, DownloadError
from deeplabzoo.files import ensure_folder

_EPILOG = """\
voc: PASCAL VOC 2012 (2 GB) into DIR/VOCdevkit/VOC2012.
trainaug: VOC 2012, and SBD (1.4 GB) converted to the 10582 training images; needs pip install 'deeplabzoo[train]'.
folder: nothing is downloaded or written; every image and mask in DIR is read, faults are reported and classes are counted.

examples:
  python -m deeplabzoo.prepare trainaug --root ~/data
  python -m deeplabzoo.prepare folder --root my_data
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run(_prepare, argv)


def build_parser() -> Parser:
    """Return the command's argument parser."""
    parser = Parser(
        "prepare",
        "Download, verify and unpack a dataset, resuming an earlier call; or check a dataset of your own.",
        _EPILOG,
    )
    parser.add_argument("data", metavar="DATA", choices=("voc", "trainaug", "folder"), help="voc, trainaug or folder")
    parser.add_argument(
        "--root", metavar="DIR", type=Path, required=True, help="folder of the dataset; existing files are kept"
    )
    return parser


def _prepare(argv: Sequence[str] | None) -> int:
    options = build_parser().parse_args(argv)
    if options.data == "folder":
        return _check(options.root)
    from deeplabzoo.data.download import prepare_trainaug, prepare_voc
    from deeplabzoo.hub.http_download import ExpectedFile, download
    from deeplabzoo.offline import offline_switch

    def fetch(url: str, file: Path) -> None:
        if switch := offline_switch():
            raise DownloadError(f"{file.name} is not in '{file.parent}' and {switch} forbids downloading it.")
        download(url, file, ExpectedFile())  # the archive's own hash is checked before it is opened

    ensure_folder(options.root)
    prepare = prepare_trainaug if options.data == "trainaug" else prepare_voc
    print(prepare(options.root, fetch))
    return 0


def _check(root: Path) -> int:
    from deeplabzoo.data.validation import check_folder

    if not root.is_dir():
        raise DataError(f"The data folder '{root}' does not exist; check --root.")
    print(check_folder(root))
    return 0
