"""`python -m deeplabzoo.prepare voc|trainaug|folder --root DIR`: training data fetched and laid out, or one's own looked at."""

from collections.abc import Sequence
from pathlib import Path

from deeplabzoo.cli.parser import Parser, run
from deeplabzoo.errors import DataError, DownloadError
from deeplabzoo.files import ensure_folder


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run(_prepare, argv)


def _parser() -> Parser:
    parser = Parser(
        "prepare",
        "Download a data set, verify and unpack it, going on where an earlier call stopped; or check a folder of your own.",
        "voc       PASCAL VOC 2012 (2 GB) into DIR/VOCdevkit/VOC2012\n"
        "trainaug  that, and SBD (1.4 GB) converted to the 10582 training images; needs pip install 'deeplabzoo[train]'\n"
        "folder    nothing is fetched or written: every picture and mask in DIR is read, faults are named, classes counted",
    )
    parser.add_argument("data", metavar="DATA", choices=("voc", "trainaug", "folder"), help="voc, trainaug or folder")
    parser.add_argument(
        "--root", metavar="DIR", type=Path, required=True, help="where to put it; what is there already is kept"
    )
    return parser


def _prepare(argv: Sequence[str] | None) -> int:
    options = _parser().parse_args(argv)
    if options.data == "folder":
        return _check(options.root)
    from deeplabzoo.data.download import prepare_trainaug, prepare_voc
    from deeplabzoo.hub.download import offline_switch
    from deeplabzoo.hub.http_download import ExpectedFile, download

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
