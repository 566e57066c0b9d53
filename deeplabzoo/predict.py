"""`python -m deeplabzoo.predict IMAGE… --out PATH`: label photos, and write what was found as pictures and numbers."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deeplabzoo.cli import Parser, add_device_option, named_network, run
from deeplabzoo.errors import ImageError, OutputError, UsageError
from deeplabzoo.inference.formats import KINDS, PICTURE_FORMATS, Kind, is_video, kind_for, video_format
from deeplabzoo.inference.sources import Source, find_photos
from deeplabzoo.models.encoder_table import short_name
from deeplabzoo.output import ensure_folder

if TYPE_CHECKING:
    from deeplabzoo.inference.large_predict import LargeResult
    from deeplabzoo.inference.predictor import Predictor, Result

DEFAULT_MODEL = "deeplabv3plus_mobilenetv2_voc"
TILE = 768
"""Side of a tile in pixels where `--tile` stands alone."""

_SUFFIX_IN_FOLDER: dict[Kind, str] = {"overlay": "_overlay.png", "labels": "_labels.png", "json": ".json"}

_EPILOG = """\
IMAGE is a photo, a folder of photos, or a pattern such as 'trip/*.jpg'. JPEG, PNG, WebP, TIFF, BMP, GIF, 16-bit, grey,
palette, CMYK and transparent pictures are read, and turned upright by their EXIF orientation.

PATH with the suffix of a picture or .json is one file for one photo: the overlay unless a choice is made, or the JSON.
A video such as clip.mp4 gives a video with tinted frames (.mp4, .mov, .mkv or .webm): docs/video.md.
Any other PATH is a folder: a photo NAME gives NAME_overlay.png, NAME_labels.png and NAME.json, or those chosen.

examples:
  python -m deeplabzoo.predict cat.jpg --out cat_overlay.png
  python -m deeplabzoo.predict photos --recursive --out results --labels --json
  python -m deeplabzoo.predict cat.jpg --out areas.json --weights mine.safetensors
  python -m deeplabzoo.predict clip.mp4 --out clip_seg.mp4 --smooth 5
  python -m deeplabzoo.predict survey.tif --out labels.tif --labels --tile 1024
"""


@dataclass(frozen=True)
class _Job:
    """One photo and the files to make of it."""

    source: Source
    files: dict[Kind, Path]


def predict_command(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, find the photos, prove that results can be written, then label photo by photo.

    A photo that cannot be read is named and the others are done; raises ImageError in the end if there was one.
    """
    args = _parser().parse_args(argv)
    if not 0 <= args.alpha <= 1:
        raise UsageError(f"--alpha must be from 0 (photo only) to 1 (colours only), not {args.alpha:g}.")
    kinds = [kind for kind in KINDS if getattr(args, kind)]
    if any(map(is_video, args.images)):
        return _label_one_video(args, kinds)
    if args.smooth:
        raise UsageError("--smooth averages the frames of a video, and there is none among what was named.")
    out = Path(args.out)
    one_file = _is_file(args.out)
    sources = find_photos(args.images, recursive=args.recursive, out=None if one_file else out)
    if not any(source.path.exists() for source in sources):
        raise ImageError(f"'{sources[0].path}' does not exist; check the path.")
    jobs = _one_job(sources, out, kinds) if one_file else [_job(source, out, kinds) for source in sources]
    _check_files(jobs)

    predictor, facts = _predictor(args)
    failed = _work(jobs, predictor, facts, alpha=args.alpha, legend=not args.no_legend)
    if failed:
        if len(jobs) == 1:
            raise ImageError(failed[0][1])
        names = ", ".join(f"'{source.path}'" for source, _ in failed[:5]) + (", ..." if len(failed) > 5 else "")
        raise ImageError(f"{len(failed)} of {len(jobs)} photos could not be read: {names}; the others are done.")
    return 0


def _label_one_video(args: Any, kinds: list[Kind]) -> int:
    source, out = Path(args.images[0]), Path(args.out)
    if len(args.images) > 1 or kinds not in ([], ["overlay"]):
        raise UsageError("A video goes alone and becomes one video: one input, --out clip.mp4, no --labels or --json.")
    video_format(out)
    if not source.is_file():
        raise ImageError(f"'{source}' does not exist or is no file; check the path.")
    _check_files([_Job(Source(source, Path(source.stem)), {"overlay": out})])
    predictor, _ = _predictor(args)

    from deeplabzoo.inference.overlay import in_words
    from deeplabzoo.inference.video import label_video

    result = label_video(predictor, source, out, alpha=args.alpha, smooth=args.smooth)
    print(f"{source.name}: {result.frames} frames, {in_words(result.found())} -> {out}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 done, 1 the work failed, 2 the call was wrong."""
    return run(predict_command, argv)


def _parser() -> Parser:
    parser = Parser("predict", "Label every pixel of photos with a DeepLab.", _EPILOG)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="photo, folder or pattern")
    parser.add_argument("--out", required=True, metavar="PATH", help="where results go: a folder, or a file for one photo")
    parser.add_argument(
        "--model", metavar="NAME", help=f"a name (`deeplabzoo.list_models()`) or a checkpoint file (default: {DEFAULT_MODEL})"
    )
    parser.add_argument(
        "--weights", metavar="TAG|FILE", help="a tag of the model (default: its first), or a file; a file alone names its model"
    )
    parser.add_argument("--overlay", action="store_true", help="write the tinted photo with a legend of classes and shares")
    parser.add_argument("--labels", action="store_true", help="write a palette PNG whose values are class numbers")
    parser.add_argument("--json", action="store_true", help="write the areas of the classes found")
    parser.add_argument("--alpha", type=float, default=0.5, help="weight of the colours in the overlay, 0...1 (default 0.5)")
    parser.add_argument("--no-legend", action="store_true", help="leave the legend out: the overlay has the photo's size")
    parser.add_argument("--recursive", action="store_true", help="search the folders below a folder, too, and keep them")
    parser.add_argument(
        "--tile",
        type=int,
        nargs="?",
        const=TILE,
        metavar="SIDE",
        help=f"cut photos into overlapping tiles at their own resolution (SIDE in pixels, {TILE} unless given) instead of "
        "resizing them as the weights say; any size, see docs/large_images.md",
    )
    parser.add_argument(
        "--overlap", type=int, metavar="N", help="with --tile: pixels that neighbours share (a quarter of SIDE)"
    )
    parser.add_argument(
        "--scale", type=float, metavar="S", help="with --tile: resize the photo by this factor first (default 1)"
    )
    parser.add_argument("--smooth", type=int, default=0, metavar="N", help="with a video: average over about N frames")
    parser.add_argument("--max-pixels", type=int, metavar="N", help="largest photo that is read (default 256 million pixels)")
    add_device_option(parser)
    parser.add_argument(
        "--engine",
        default="auto",
        help="auto (default: what was measured fastest before, else torch), torch, compiled, onnxruntime or openvino",
    )
    parser.add_argument("--precision", default="fp32", help="fp32 (default), bf16, fp16 or int8, where engine and hardware can")
    return parser


def _is_file(out: str) -> bool:
    path = Path(out)
    return not out.endswith(("/", "\\")) and not path.is_dir() and path.suffix.lower() in (*PICTURE_FORMATS, ".json")


def _one_job(sources: list[Source], out: Path, kinds: list[Kind]) -> list[_Job]:
    """Return the job of `--out FILE`: a picture, or JSON, or a picture with its JSON beside it."""
    if len(sources) != 1:
        raise UsageError(f"--out '{out}' is one file, but there are {len(sources)} photos; give a folder.")
    if "overlay" in kinds and "labels" in kinds:
        raise UsageError(f"--overlay and --labels are two pictures and --out '{out}' is one file; give a folder.")
    files: dict[Kind, Path] = {}
    for kind in kinds or [kind_for(out)]:
        beside = kind == "json" and len(kinds) > 1 and out.suffix.lower() != ".json"
        files[kind] = out.with_suffix(".json") if beside else out
        kind_for(files[kind], kind)
    return [_Job(sources[0], files)]


def _job(source: Source, out: Path, kinds: list[Kind]) -> _Job:
    stem = out / source.name
    return _Job(source, {kind: stem.with_name(stem.name + _SUFFIX_IN_FOLDER[kind]) for kind in kinds or KINDS})


def _check_files(jobs: list[_Job]) -> None:
    """Raise before the network is loaded if a result could not be written, or would take the place of a photo."""
    photos = {job.source.path.resolve() for job in jobs}
    files = [file for job in jobs for file in job.files.values()]
    for file in files:
        if file.resolve() in photos:
            raise UsageError(f"The result '{file}' would overwrite the photo; name another --out.")
        if file.is_dir():
            raise OutputError(f"The result '{file}' cannot be written: a folder of that name is there.")
    for folder in dict.fromkeys(file.parent for file in files):
        ensure_folder(folder)


def _predictor(args: Any) -> tuple["Predictor", dict[str, Any]]:
    """Return the predictor, and the facts about it for the JSON; a weights file without a model says itself what it is."""
    model, weights = args.model, args.weights
    if model is None and weights is not None and Path(weights).is_file():
        model, weights = weights, None
    net = named_network(model or DEFAULT_MODEL, weights)

    from deeplabzoo.inference.predictor import Predictor  # after the names are known to be right: torch takes seconds

    predictor = Predictor(
        net,
        args.device,
        args.engine,
        precision=args.precision,
        tile="auto" if args.tile is None else args.tile,
        overlap=args.overlap,
        scale=args.scale,
        max_pixels=args.max_pixels,
    )
    source = net.weights_source
    name = source.get("name") or f"{net.config.architecture}_{short_name(net.config.encoder)}"
    return predictor, {"model": name, "weights": source, "device": str(predictor.device)}


def _work(
    jobs: list[_Job], predictor: "Predictor", facts: dict[str, Any], *, alpha: float, legend: bool
) -> list[tuple[Source, str]]:
    """Label the photos and write their files; returns those that could not be read, with the reason."""
    from tqdm import tqdm

    from deeplabzoo.inference.large_predict import goes_from_file_to_file, predict_to_files

    failed: list[tuple[Source, str]] = []
    for job in tqdm(jobs, unit="photo", disable=None if len(jobs) > 1 else True, dynamic_ncols=True):
        about = {"image": str(job.source.path), **facts}
        result: Result | LargeResult
        try:
            if goes_from_file_to_file(predictor, job.source.path):
                result = predict_to_files(predictor, job.source.path, job.files, alpha=alpha, legend=legend, facts=about)
            else:
                result = photo = predictor(job.source.path)
                for kind, file in job.files.items():
                    photo.save(file, kind, alpha=alpha, legend=legend, facts=about)
        except ImageError as error:
            failed.append((job.source, str(error)))
            if len(jobs) > 1:
                tqdm.write(f"skipped: {error}", file=sys.stderr)
            continue
        tqdm.write(_summary(job, result))
    return failed


def _summary(job: _Job, result: "Result | LargeResult") -> str:
    from deeplabzoo.inference.overlay import in_words

    return f"{job.source.path.name}: {in_words(result.found())} -> {', '.join(str(file) for file in job.files.values())}"


if __name__ == "__main__":
    sys.exit(main())
