"""`python -m deeplabzoo.publish RUN_DIR`: turn a finished run into a release, beside the manifest or on the Hub if asked.

The figures are those of the released file itself, read back and measured; nothing replaces a weight under the same tag.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from deeplabzoo.cli.parser import Parser, add_device_option, run
from deeplabzoo.errors import UsageError

_EPILOG = """\
RUN_DIR is the --out of `python -m deeplabzoo.train`. The release folder gets NAME.TAG.safetensors, golden logits of it, the
evaluation reports, row.json (its manifest row), config.json, a model card README.md and its pictures. With --manifest these
are put beside that manifest and listed in it; with --hub they are uploaded.

examples:
  python -m deeplabzoo.publish runs/voc --data ~/data --photo cat.jpg
  python -m deeplabzoo.publish runs/voc --data ~/data --photo cat.jpg --data-license "PASCAL VOC 2012: images from Flickr, \
under their terms" --manifest weights/manifest.json
  python -m deeplabzoo.publish runs/mine --data my_data --data-license "our own pictures" --hub someone/their-deeplab
"""


def publish_command(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and publish; raises DeepLabZooError where it cannot."""
    args = _parser().parse_args(list(sys.argv[1:] if argv is None else argv))
    if args.default and not args.manifest:
        raise UsageError("--default says which row of a manifest is meant by the bare name; it needs --manifest.")
    from deeplabzoo.publish.publish import PublishConfig, publish  # torch, only now

    order = PublishConfig(
        run=args.run_dir,
        data=args.data,
        tag=args.tag,
        name=args.name,
        precision=args.precision,
        chosen=args.weights,
        out=args.out or args.run_dir / "release",
        photo=args.photo,
        data_license=args.data_license,
        license=args.license,
        manifest=args.manifest,
        default=args.default,
        hub=args.hub,
        device=args.device,
    )
    print(publish(order))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 done, 1 the work failed, 2 the call was wrong."""
    return run(publish_command, argv)


def _parser() -> Parser:
    parser = Parser("publish", "Turn a finished training run into a release: weights, figures, manifest row, card.", _EPILOG)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of a run that has ended")
    parser.add_argument("--data", type=Path, metavar="ROOT", help="the run's data; without it no figure is measured")
    parser.add_argument("--tag", default="v1", help="which weights of that name these are (default v1)")
    parser.add_argument("--name", help="default: architecture_encoder[_data], from the run")
    parser.add_argument("--precision", choices=("fp16", "fp32"), default="fp16", help="of the released file (default fp16)")
    parser.add_argument("--weights", choices=("best", "last"), default="best", help="the run's best on val (default) or last")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the release folder (default RUN_DIR/release)")
    parser.add_argument("--photo", type=Path, metavar="FILE", help="a photo that may be shown in the card")
    parser.add_argument("--data-license", metavar="TEXT", help="terms of the training pictures; needed by --manifest and --hub")
    parser.add_argument("--license", metavar="TEXT", default="Apache-2.0", help="of the released weights (default Apache-2.0)")
    parser.add_argument("--manifest", type=Path, metavar="FILE", help="bundle the release beside this manifest, and list it")
    parser.add_argument("--default", action="store_true", help="mean these weights by the bare name (a first row always is)")
    parser.add_argument("--hub", metavar="OWNER/REPO", help="upload the release to this repository of the Hugging Face Hub")
    add_device_option(parser)
    return parser
