"""`python -m deeplabzoo.publish RUN_DIR`: package a finished run as a release, optionally in a manifest or on the Hub.

Metrics are measured on the released file after it was read back; a checkpoint is never replaced under the same tag.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from deeplabzoo.cli.parser import Parser, add_device_option, run
from deeplabzoo.errors import UsageError

_EPILOG = """\
RUN_DIR is the --out of `python -m deeplabzoo.train`. The release folder gets NAME.TAG.safetensors, its golden logits, the \
evaluation reports, row.json (its manifest row), config.json, and the model card README.md with its images. With --manifest \
these are added to that manifest; with --hub they are uploaded.

examples:
  python -m deeplabzoo.publish runs/voc --root ~/data --image cat.jpg
  python -m deeplabzoo.publish runs/voc --root ~/data --data-license "PASCAL VOC 2012: Flickr terms" \
--manifest weights/manifest.json
  python -m deeplabzoo.publish runs/mine --root my_data --data-license "our own images" --hub someone/their-deeplab
"""


def publish_command(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and publish; raises DeepLabZooError on failure."""
    args = build_parser().parse_args(list(sys.argv[1:] if argv is None else argv))
    if args.default and not args.manifest:
        raise UsageError("--default selects the default tag in a manifest; it needs --manifest.")
    from deeplabzoo.publish.publish import (
        PublishConfig,
        publish,
    )  # after the arguments have been checked: torch takes seconds to import

    config = PublishConfig(
        run=args.run_dir,
        data=args.root,
        tag=args.tag,
        name=args.name,
        precision=args.precision,
        chosen=args.checkpoint,
        out=args.out or args.run_dir / "release",
        image=args.image,
        data_license=args.data_license,
        license=args.license,
        manifest=args.manifest,
        default=args.default,
        hub=args.hub,
        device=args.device,
    )
    print(publish(config))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(publish_command, argv)


def build_parser() -> Parser:
    """Return the command's argument parser."""
    parser = Parser("publish", "Package a finished training run as a release: weights, metrics, manifest row, card.", _EPILOG)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of a finished run")
    parser.add_argument("--root", type=Path, metavar="DIR", help="folder of the run's dataset; without it nothing is measured")
    parser.accept_old_spelling("--data", "--root")
    parser.add_argument("--tag", default="v1", help="tag of the checkpoint")
    parser.add_argument("--name", help="name of the model (default: architecture_encoder[_data], from the run)")
    parser.add_argument("--precision", choices=("fp16", "fp32"), default="fp16", help="of the released file")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="the run's best on val, or its last")
    parser.accept_old_spelling("--weights", "--checkpoint")
    parser.add_argument("--out", type=Path, metavar="DIR", help="release folder (default: RUN_DIR/release)")
    parser.add_argument("--image", type=Path, metavar="FILE", help="image whose overlay is shown in the model card")
    parser.accept_old_spelling("--photo", "--image")
    parser.add_argument(
        "--data-license", metavar="TEXT", help="licence of the training images; required by --manifest and --hub"
    )
    parser.add_argument("--license", metavar="TEXT", default="Apache-2.0", help="licence of the released weights")
    parser.add_argument("--manifest", type=Path, metavar="FILE", help="add the release to this manifest, beside its files")
    parser.add_argument(
        "--default", action="store_true", help="make this tag the default of the model (automatic for its first release)"
    )
    parser.add_argument("--hub", metavar="OWNER/REPO", help="upload the release to this repository of the Hugging Face Hub")
    add_device_option(parser)
    return parser
