"""`python -m deeplabzoo.predict IMAGE… --out PATH`: label images or a video, and write overlays, labels and areas."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deeplabzoo.cli.parser import (
    Parser,
    add_backend_option,
    add_device_option,
    add_precision_option,
    load_named_model,
    run,
)
from deeplabzoo.data.image_sources import Source, find_images
from deeplabzoo.errors import ImageError, UsageError, printable
from deeplabzoo.inference.inputs import (
    KINDS,
    Job,
    Kind,
    is_output_file,
    is_video,
    job_for_file,
    job_for_folder,
    prepare_outputs,
    video_format,
)
from deeplabzoo.log import logger

if TYPE_CHECKING:
    from deeplabzoo.inference.batch import Outcome
    from deeplabzoo.inference.predictor import Predictor


DEFAULT_MODEL = "deeplabv3plus_mobilenetv2_voc"
TILE = 768
"""Side of a tile in pixels where `--tile` stands alone."""

_EPILOG = """\
IMAGE is an image file, a folder of images, a pattern such as 'trip/*.jpg', a URL such as s3://bucket/trip, or a
text file (.txt) that lists images, one a line. JPEG, PNG, WebP, TIFF, BMP and GIF files are read, also 16-bit, grey,
palette, CMYK and transparent ones, and turned upright by their EXIF orientation. Models of other than 1 or 3 input
channels read .npy and TIFF files of so many channels.

PATH with the suffix of an image or .json is one file for one image: by default the overlay, or the JSON.
A video such as clip.mp4 gives a video with tinted frames (.mp4, .mov, .mkv or .webm): docs/video.md.
Any other PATH is a folder: an image NAME gives NAME_overlay.png, NAME_labels.png and NAME.json, or those chosen.
There, images that were done before with the same weights and settings are skipped: docs/many_images.md.

examples:
  python -m deeplabzoo.predict cat.jpg --out cat_overlay.png
  python -m deeplabzoo.predict photos --recursive --out results --labels --json
  python -m deeplabzoo.predict cat.jpg --out areas.json --weights mine.safetensors
  python -m deeplabzoo.predict clip.mp4 --out clip_seg.mp4 --smooth 5
  python -m deeplabzoo.predict survey.tif --out labels.tif --labels --tile 1024
"""


def predict_command(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, find the images, check that results can be written, then label image by image.

    An image that cannot be read is named and the others are labelled; ImageError is raised at the end if there was one.
    """
    args = build_parser().parse_args(argv)
    if not 0 <= args.alpha <= 1:
        raise UsageError(f"--alpha must be from 0 (image only) to 1 (colours only), not {args.alpha:g}.")
    kinds = [kind for kind in KINDS if getattr(args, kind)]
    if any(map(is_video, args.images)):
        return _label_one_video(args, kinds)
    if args.workers < 1:
        raise UsageError(f"--workers must be at least 1, not {args.workers}.")
    if args.smooth:
        raise UsageError("--smooth averages the frames of a video, and no video was given.")
    out = Path(args.out)
    one_file = is_output_file(args.out)
    sources = find_images(args.images, recursive=args.recursive, out=None if one_file else out)
    if not any(source.url or os.path.exists(source.path) for source in sources):
        raise ImageError(f"'{sources[0].path}' does not exist; check the path.")
    jobs = [job_for_file(sources, out, kinds)] if one_file else [job_for_folder(source, out, kinds) for source in sources]
    prepare_outputs(jobs)

    predictor, facts = _predictor(args)
    failed = _work(jobs, predictor, facts, args, stamped=not one_file)
    if failed:
        if len(jobs) == 1:
            raise ImageError(failed[0].line)
        names = ", ".join(f"'{one.job.source.display_name}'" for one in failed[:5]) + (", ..." if len(failed) > 5 else "")
        raise ImageError(f"{len(failed)} of {len(jobs)} images could not be read: {names}; the others are done.")
    return 0


def _label_one_video(args: Any, kinds: list[Kind]) -> int:
    source, out = Path(args.images[0]), Path(args.out)
    if len(args.images) > 1 or kinds not in ([], ["overlay"]):
        raise UsageError("A video is labelled alone, into one video: one input, --out clip.mp4, no --labels or --json.")
    video_format(out)
    if not os.path.isfile(source):
        raise ImageError(f"'{source}' does not exist or is not a file; check the path.")
    prepare_outputs([Job(Source(source, Path(source.stem)), {"overlay": out})])
    predictor, _ = _predictor(args)

    from deeplabzoo.inference.video import label_video
    from deeplabzoo.inference.visualization import areas_summary

    result = label_video(predictor, source, out, alpha=args.alpha, smooth=args.smooth)
    print(printable(f"{source.name}: {result.frames} frames, {areas_summary(result.found())} -> {out}"))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 1 the work failed, 2 the call was wrong."""
    return run(predict_command, argv)


def build_parser() -> Parser:
    """Return the command's argument parser."""
    parser = Parser("predict", "Label every pixel of images with a DeepLab model.", _EPILOG)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image, folder, pattern, URL or list")
    parser.add_argument("--out", required=True, metavar="PATH", help="folder of results, or a file for one image")
    parser.add_argument(
        "--model", metavar="NAME", help=f"a name (`deeplabzoo.list_models()`) or a checkpoint file (default: {DEFAULT_MODEL})"
    )
    parser.add_argument(
        "--weights", metavar="TAG|FILE", help="a tag of the model (default: its first), or a file; a file alone names its model"
    )
    parser.add_argument("--overlay", action="store_true", help="write the tinted image with a legend of classes and shares")
    parser.add_argument("--labels", action="store_true", help="write a palette PNG whose values are class numbers")
    parser.add_argument("--json", action="store_true", help="write the areas of the classes found")
    parser.add_argument("--alpha", type=float, default=0.5, help="weight of the colours in the overlay, 0...1 (default 0.5)")
    parser.add_argument("--no-legend", action="store_true", help="no legend: the overlay has the image's size")
    parser.add_argument("--recursive", action="store_true", help="search subfolders and mirror them in --out")
    parser.add_argument(
        "--tile",
        type=int,
        nargs="?",
        const=TILE,
        metavar="SIDE",
        help=f"cut images into overlapping tiles at their own resolution (SIDE in pixels, default {TILE}) instead of the "
        "weights' own resize; for images of any size, see docs/large_images.md",
    )
    parser.add_argument(
        "--overlap", type=int, metavar="N", help="with --tile: pixels that neighbouring tiles share (default a quarter of SIDE)"
    )
    parser.add_argument(
        "--scale", type=float, metavar="S", help="with --tile: resize the image by this factor first (default 1)"
    )
    parser.add_argument("--smooth", type=int, default=0, metavar="N", help="with a video: average over about N frames")
    parser.add_argument("--max-pixels", type=int, metavar="N", help="largest image that is read (default 256 million pixels)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="number of processes (default 1)")
    parser.add_argument("--overwrite", action="store_true", help="recompute existing results")
    parser.accept_old_spelling("--again", "--overwrite")
    add_device_option(parser)
    add_backend_option(
        parser, "auto", backends="torch, compiled, onnxruntime, openvino or auto (the fastest measured before, else torch)"
    )
    add_precision_option(parser)
    return parser


def _predictor(args: Any) -> tuple["Predictor", dict[str, Any]]:
    """Return the predictor and its facts for the JSON; a checkpoint given as --weights alone names its model itself."""
    model, weights = args.model, args.weights
    if model is None and weights is not None and Path(weights).is_file():
        model, weights = weights, None
    net = load_named_model(model or DEFAULT_MODEL, weights)

    from deeplabzoo.inference.predictor import Predictor  # only after the names were checked: torch takes seconds
    from deeplabzoo.models.encoder_table import short_name

    predictor = Predictor(
        net,
        args.device,
        args.backend,
        precision=args.precision,
        tile="auto" if args.tile is None else args.tile,
        overlap=args.overlap,
        scale=args.scale,
        max_pixels=args.max_pixels,
    )
    source = net.weights_source
    name = source.get("name") or f"{net.config.architecture}_{short_name(net.config.encoder)}"
    return predictor, {"model": name, "weights": source, "device": str(predictor.device)}


def _work(jobs: list[Job], predictor: "Predictor", facts: dict[str, Any], args: Any, *, stamped: bool) -> list["Outcome"]:
    """Label the images that are not finished yet and write their files; return the outcomes of those that could not be read."""
    from tqdm import tqdm

    from deeplabzoo.inference.batch import (
        OutputOptions,
        is_up_to_date,
        label_image_files,
        remove_partial_outputs,
        settings_hash,
    )

    settings = settings_hash(predictor) if stamped else None
    options = OutputOptions(args.alpha, not args.no_legend, facts, settings)
    work = jobs
    if settings is not None and not args.overwrite:
        work = [job for job in jobs if not is_up_to_date(job, settings, alpha=options.alpha, legend=options.legend)]
    if done := len(jobs) - len(work):
        logger.info(f"skipped {done} of {len(jobs)} images: done before with the same weights and settings (see --overwrite)")
    failed = []
    outcomes = label_image_files(predictor, work, options, workers=args.workers)
    for outcome in tqdm(outcomes, unit="image", total=len(work), disable=None if len(jobs) > 1 else True, dynamic_ncols=True):
        if outcome.failed:
            failed.append(outcome)
        if not outcome.failed:
            tqdm.write(printable(outcome.line))
        elif len(jobs) > 1:
            tqdm.write(printable(f"skipped: {outcome.line}"), file=sys.stderr)
    remove_partial_outputs(jobs)
    return failed
