"""`python -m deeplabzoo.prepare voc|trainaug --root DIR`: fetch a data set from its publisher and lay it out for training."""

import sys
from collections.abc import Sequence
from pathlib import Path

from deeplabzoo.cli import Parser, run
from deeplabzoo.output import ensure_folder


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run(_prepare, argv)


def _parser() -> Parser:
    parser = Parser(
        "prepare",
        "Download a data set, verify and unpack it. An interrupted download or conversion goes on where it stopped.",
        "voc       PASCAL VOC 2012 (2 GB) into DIR/VOCdevkit/VOC2012\n"
        "trainaug  that, and SBD (1.4 GB) converted to the 10582 training images; needs pip install 'deeplabzoo[train]'",
    )
    parser.add_argument("data", metavar="DATA", choices=("voc", "trainaug"), help="voc or trainaug")
    parser.add_argument(
        "--root", metavar="DIR", type=Path, required=True, help="where to put it; what is there already is kept"
    )
    return parser


def _prepare(argv: Sequence[str] | None) -> int:
    options = _parser().parse_args(argv)
    from deeplabzoo.data.download import prepare_trainaug, prepare_voc
    from deeplabzoo.zoo.checksum import Expected
    from deeplabzoo.zoo.download import download

    def fetch(url: str, file: Path) -> None:
        download(url, file, Expected())  # the archive's own hash is checked before it is opened

    ensure_folder(options.root)
    prepare = prepare_trainaug if options.data == "trainaug" else prepare_voc
    print(prepare(options.root, fetch))
    return 0


if __name__ == "__main__":
    sys.exit(main())
