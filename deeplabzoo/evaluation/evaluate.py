"""Evaluation of a model on a labelled dataset: the loop over images, shared with training, and `evaluate`, which reports."""

import datetime
import math
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Literal, ParamSpec, Self

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from deeplabzoo.checkpoints.native import tensors_sha256
from deeplabzoo.data.classes import subset_note
from deeplabzoo.data.dataset import Sample, SegmentationDataset, build_dataset
from deeplabzoo.data.image_io import Labels, Pixels
from deeplabzoo.device import choose_device, device_of, eval_mode, without_wrappers
from deeplabzoo.errors import DataError, UsageError
from deeplabzoo.evaluation.metrics import ConfusionMatrix
from deeplabzoo.evaluation.report import Protocol, Report, hardware, image_list_sha256, software_versions
from deeplabzoo.hub.factory import load_named_model
from deeplabzoo.inference.large_image import ArrayRowReader
from deeplabzoo.inference.tiling import AUTO_PIXELS, Tiling, parse_tiling, predict_bands, tiling_for
from deeplabzoo.log import logger
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.models.encoder_table import short_name
from deeplabzoo.optimization.optimized_model import OptimizedDeepLab, is_optimizable, optimize
from deeplabzoo.processing.postprocessing import class_logits, logit_bands
from deeplabzoo.processing.preprocessing import image_labels, image_probabilities, low_resolution_logits, prepare

Arguments = ParamSpec("Arguments")

ONE_CLASS_FRACTION = 0.99
"""Fraction of all predictions above which a single class is reported: all-black label images that score well."""


def prefetch(
    data: SegmentationDataset, indices: Iterable[int], *, num_threads: int = 1, prefetch_size: int = 2
) -> Generator[Sample, None, None]:
    """Yield `data[i]` for each index in order, while threads read the next ones.

    Decoding holds the Python lock for moments only, so threads suffice and no image is copied between processes. An error of
    reading an image is raised at its turn, after all images before it. Close the generator (`contextlib.closing`) to stop
    early: it waits for the images that are being read.

    Args:
        data: The dataset.
        indices: Which samples, in which order.
        num_threads: Reader threads.
        prefetch_size: At most so many samples wait in memory.
    """
    waiting: deque[Future[Sample]] = deque()
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="deeplabzoo-reader")
    try:
        for index in indices:
            waiting.append(pool.submit(data.__getitem__, index))
            if len(waiting) > prefetch_size:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class BackgroundWorker(Generic[Arguments]):
    """Calls `work` in another thread, one call at a time and in order.

    What a call raises is raised by the next call, or at the end of the `with` block, after which all calls are done.

    Args:
        work: The function to call.
    """

    def __init__(self, work: Callable[Arguments, object]) -> None:
        self._work = work
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="deeplabzoo-behind")
        self._last: Future[object] | None = None

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        """Wait for the previous call, then start this one."""
        self._finish()
        self._last = self._pool.submit(self._work, *args, **kwargs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _finish(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            last.result()


class _EvaluatedModel:
    """A model as the loop runs it: input is converted to its device and float type."""

    def __init__(self, model: DeepLab | OptimizedDeepLab) -> None:
        self.model, self.device = model, device_of(model)
        self.preprocessing, self.config = model.preprocessing, model.config
        self._dtype = next(model.parameters()).dtype if isinstance(model, DeepLab) else torch.float32

    def forward_low_resolution(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the head's logits, B x channels x h x w."""
        return self.model.forward_low_resolution(image_BCHW.to(self.device, self._dtype))

    def forward_tile(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the head's logits, one channel per class."""
        return class_logits(self.forward_low_resolution(image_BCHW), self.config.num_classes)


@dataclass(eq=False)
class EvaluationSums:
    """What the loop adds up over images."""

    matrix: ConfusionMatrix
    loss: float = 0.0
    """Sum of the cross-entropy over `loss_pixels` labelled pixels; images that are cut into tiles are left out."""
    loss_pixels: int = 0
    tiled_images: int = 0
    """Images that were cut into tiles."""


def evaluate_images(
    model: DeepLab | OptimizedDeepLab,
    data: SegmentationDataset,
    indices: Sequence[int],
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    tiling: Tiling | Literal["auto"] | None = "auto",
    with_loss: bool = False,
    transform: Callable[[Sample], Sample] | None = None,
    seen: Callable[[Sample, Labels], object] | None = None,
    progress: bool = False,
) -> EvaluationSums:
    """Predict images of a dataset and count them in a confusion matrix; the one evaluation loop of `evaluate` and training.

    Memory stays bounded: logits are upsampled in bands of rows, and images are cut into tiles where Predictor cuts them.

    Args:
        model: The model, in eval mode (`device.eval_mode`).
        data: The dataset.
        indices: Which images.
        scales: Softmax outputs are averaged over these scales.
        flip: Whether to average over the mirrored image, too.
        tiling: How images are cut; "auto" as Predictor does. Several scales and `flip` run images whole.
        with_loss: Whether to sum the cross-entropy of a single pass, too.
        transform: Applied to each sample first.
        seen: Called with each sample and its predicted labels, H x W.
        progress: Whether to show a progress bar.
    """
    runner = _EvaluatedModel(model)
    sums = EvaluationSums(ConfusionMatrix(len(data.classes), data.ignore_index))
    averaged = len(scales) > 1 or flip
    with closing(prefetch(data, indices)) as samples, BackgroundWorker(sums.matrix.update) as count:
        for sample in tqdm(samples, total=len(indices), desc="evaluate", unit="image", disable=None if progress else True):
            one = transform(sample) if transform is not None else sample
            cut = None if averaged else tiling_for(one.labels.shape, model.preprocessing, tiling)
            predicted = predict_labels(runner, one, sums, scales, flip, cut, with_loss)
            if seen is not None:
                seen(one, predicted)
            count(predicted, one.labels)
    return sums


def predict_labels(
    runner: Any,
    sample: Sample,
    sums: EvaluationSums,
    scales: Sequence[float],
    flip: bool,
    cut: Tiling | None,
    with_loss: bool,
) -> Labels:
    """Return the labels of one image at its own size, H x W, adding its loss to `sums` where that is asked for."""
    image_HWC: Pixels = sample.image
    if cut is not None:
        sums.tiled_images += 1
        rows = ArrayRowReader(image_HWC)
        options = {"align_corners": runner.config.align_corners, "channels": runner.config.in_chans}
        bands = predict_bands(runner.forward_tile, rows, runner.preprocessing, cut, **options)
        tiled: Labels = np.concatenate([labels_HW for _, labels_HW in bands])
        return tiled
    if len(scales) > 1 or flip:
        labels: Labels = image_probabilities(runner, image_HWC, scales, flip)[0].argmax(dim=0).cpu().numpy()
        return labels
    prepared = prepare(image_HWC, runner.preprocessing, scale=scales[0], channels=runner.config.in_chans)
    if not with_loss:
        return image_labels(runner, prepared)
    low_1CHW, geometry = low_resolution_logits(runner, prepared)
    classes, ignore_index = low_1CHW.shape[1], sums.matrix.ignore_index
    predicted: Labels = np.empty(sample.labels.shape, np.uint8 if classes <= 256 else np.uint16)
    for top, bottom, logits_1CHW in logit_bands(low_1CHW, geometry):
        truth_1HW = torch.from_numpy(sample.labels[None, top:bottom].astype(np.int64)).to(logits_1CHW.device)
        # the confusion matrix reports labels that are no class in a sentence, cross_entropy in a RuntimeError
        truth_1HW = truth_1HW.masked_fill((truth_1HW == ignore_index) | (truth_1HW >= classes), -100)
        sums.loss += float(F.cross_entropy(logits_1CHW, truth_1HW, reduction="sum"))
        sums.loss_pixels += int((truth_1HW >= 0).sum())
        predicted[top:bottom] = logits_1CHW[0].argmax(dim=0).cpu().numpy()
    return predicted


def warn_if_one_class(matrix: ConfusionMatrix, classes: Sequence[str]) -> None:
    """Warn where nearly all predictions are one class that has fewer true pixels: such a model may score well."""
    total = matrix.counts.sum()
    if not total:
        return
    predicted, true = matrix.counts.sum(axis=0) / total, matrix.counts.sum(axis=1) / total
    most = int(predicted.argmax())
    if predicted[most] > ONE_CLASS_FRACTION > true[most]:
        logger.warning(
            f"{100 * predicted[most]:.1f} % of all predictions are '{classes[most]}', which has {100 * true[most]:.1f} % of "
            "the labelled pixels: the model is not trained enough (class_weights or a lower lr may help), or its input is not "
            "what it expects"
        )


def evaluate(
    net: DeepLab | OptimizedDeepLab | str | os.PathLike[str],
    data: str | SegmentationDataset,
    root: str | os.PathLike[str] | None = None,
    split: str = "val",
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    output_stride: int | None = None,
    limit: int | None = None,
    progress: bool = True,
    device: str | torch.device = "auto",
    model: str | None = None,
    engine: str | None = "torch",
    precision: str = "fp32",
    seen: Callable[[Sample, Labels], object] | None = None,
    tile: int | tuple[int, int] | Literal["auto"] | None = "auto",
    overlap: int | None = None,
    scale: float | None = None,
) -> Report:
    """Score a model on a split of a dataset.

    Predictions are brought to the size of the labels, never the labels to the predictions. The model runs in its optimized
    form, which differs from the plain one by rounding alone (mIoU was equal to four decimals on real images).

    Args:
        net: A model; or a name or checkpoint file, as `deeplabzoo.create` and `load` take them. DataParallel,
            DistributedDataParallel, AveragedModel and torch.compile wrappers are removed. An OptimizedDeepLab runs as it is.
        data: A dataset's name (`voc`, `camvid`, `folder` ...), or an opened dataset.
        root: Folder of the dataset; needed with a name.
        split: The dataset's split; used with a name.
        scales: Softmax outputs are averaged over these scales (DeepLabV3, section 4.1).
        flip: Average over the mirrored image, too.
        output_stride: Evaluate at this output stride; it is reset afterwards.
        limit: Evaluate only the first so many images; the report says so.
        progress: Show a progress bar.
        device: Where to run; the model is moved back afterwards.
        model: The model's name in the report; default: as its weights say.
        engine: Backend as `DeepLab.optimize` takes it; None runs the plain model.
        precision: Precision of the backend.
        seen: Called with each sample and its predicted labels, H x W.
        tile: Side of tiles in pixels, or (height, width), at the images' own resolution times `scale`; "auto" cuts images where
            Predictor does; None never cuts.
        overlap: Pixels that neighbouring tiles share (default: a quarter of the tile).
        scale: Factor by which images are resized before they are cut into tiles (default 1).

    Returns:
        Scores with everything needed to measure them again.

    Raises:
        UsageError: Settings or classes do not fit each other, or `net` or `data` is of another kind.
        DataError: The dataset is incomplete, or holds nothing to score.
        ImageError: An image cannot be read.
    """
    given = None
    net = _unwrapped(net)
    if isinstance(net, OptimizedDeepLab):
        given, net = net, _source_model(net, output_stride)
    data = _open_data(net, data, root, split)
    tiling = parse_tiling(tile, overlap, scale)
    _check(net, data, scales, limit)
    if isinstance(tiling, Tiling) and (len(scales) > 1 or flip):
        raise UsageError("Tiles are evaluated in a single pass; leave out tile, or scales and flip.")
    count = min(limit or len(data), len(data))
    started = time.perf_counter()
    place = device if given is None else given.device
    with _on_device(net, place) as chosen, _with_output_stride(net, output_stride), eval_mode(net):
        runs: DeepLab | OptimizedDeepLab = net
        if given is not None:
            runs = given
        elif engine is not None and is_optimizable(net):
            runs = optimize(net, engine, precision=precision)
        sums = evaluate_images(runs, data, range(count), scales=scales, flip=flip, tiling=tiling, seen=seen, progress=progress)
        matrix = sums.matrix
        seconds = time.perf_counter() - started
        if not matrix.counts.any():
            raise DataError(f"All pixels of these {count} images are void ({data.ignore_index}); there is nothing to score.")
        warn_if_one_class(matrix, data.classes)
        prep = net.preprocessing
        return Report(
            model=model or net.weights_source.get("name") or f"{net.config.architecture}_{short_name(net.config.encoder)}",
            weights={"tag": None, "source": None, "sha256": None, **net.weights_source, "tensors_sha256": tensors_sha256(net)},
            data=data.name,
            split=data.split,
            images=count,
            limit=None if count == len(data) else count,
            subset=subset_note(data.name, data.split, count) or _subset_note(count, len(data)),
            image_list_sha256=image_list_sha256(data.names[:count]),
            protocol=Protocol(
                scales=tuple(scales),
                flip=flip,
                output_stride=net.output_stride,
                resize=prep.resize,
                size=prep.size,
                pad=prep.pad,
                ignore_index=data.ignore_index,
                tiles=_tiles_note(tiling) if sums.tiled_images else None,
            ),
            classes=tuple(data.classes),
            scores=matrix.scores(),
            confusion_matrix=tuple(tuple(row) for row in matrix.counts.tolist()),
            versions=software_versions(),
            hardware=hardware(chosen),
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            seconds=round(seconds, 3),
        )


def _unwrapped(net: Any) -> DeepLab | OptimizedDeepLab:
    """Return the model behind a name, a file or a wrapper; raises UsageError for anything else."""
    if isinstance(net, str | os.PathLike):
        return load_named_model(os.fspath(net))
    kind, net = type(net).__name__, without_wrappers(net)
    if not isinstance(net, DeepLab | OptimizedDeepLab):
        raise UsageError(
            f"evaluate takes a DeepLab model, its optimized form, a model's name or a checkpoint file, not {kind}; "
            "of a module that contains one, pass that one."
        )
    return net


def _source_model(fast: OptimizedDeepLab, output_stride: int | None) -> DeepLab:
    """Return the model of an optimized one, whose tensors the report names; raises UsageError if they were changed."""
    if output_stride not in (None, fast.output_stride):
        raise UsageError(f"This optimized model runs at output stride {fast.output_stride}; optimize it again at another one.")
    if not fast.current:
        raise UsageError(
            "The model has changed since it was optimized, so its score would be of other weights; optimize it again."
        )
    return fast.net


def _tiles_note(tiling: Tiling | Literal["auto"] | None) -> str:
    made = tiling if isinstance(tiling, Tiling) else Tiling(scale=None)
    text = f"tiles of {made.tile[1]} x {made.tile[0]}, overlap {made.overlap}"
    if made.scale is None:
        return f"images above {AUTO_PIXELS / 1e6:.1f} megapixels in {text}"
    return text if made.scale == 1 else f"{text}, scale {made.scale:g}"


def _subset_note(count: int, whole: int) -> str | None:
    return None if count == whole else f"the first {count} of {whole} images"


def _open_data(net: DeepLab, data: Any, root: str | os.PathLike[str] | None, split: str) -> SegmentationDataset:
    if isinstance(data, str):
        if root is None:
            raise UsageError(f"evaluate needs root=, the folder that holds '{data}'.")
        return build_dataset(data, root, split, classes=net.classes)
    missing = [name for name in ("classes", "ignore_index", "names", "__getitem__", "__len__") if not hasattr(data, name)]
    if missing:
        raise UsageError(
            f"evaluate takes a dataset's name or a dataset opened by deeplabzoo.data.dataset.build_dataset, not "
            f"{type(data).__name__} (it has no {', '.join(missing)}); ConfusionMatrix.update scores tensors of labels directly."
        )
    opened: SegmentationDataset = data
    return opened


def _check(net: DeepLab, data: SegmentationDataset, scales: Sequence[float], limit: int | None) -> None:
    if not scales or not all(math.isfinite(scale) and scale > 0 for scale in scales):
        raise UsageError(f"scales must be numbers above 0, such as 0.5 1 1.5, not {tuple(scales)!r}.")
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be at least 1, not {limit!r}.")
    if len(data) == 0:
        raise DataError(f"The split '{data.split}' of '{data.name}' holds no image.")
    if net.config.in_chans not in (1, 3):  # RGB becomes grey for one channel
        raise UsageError(f"The model takes {net.config.in_chans} channels; datasets here are RGB, so it cannot be evaluated.")
    if 0 <= data.ignore_index < len(data.classes):
        logger.warning(
            f"label {data.ignore_index} is both the class '{data.classes[data.ignore_index]}' and the ignored label of "
            f"{data.name}: its pixels are not scored, and it has no part in the means"
        )
    if len(net.classes) != len(data.classes):
        raise UsageError(
            f"The model has {len(net.classes)} classes but {data.name} {data.split} has {len(data.classes)}; "
            "evaluate it on data of its own classes, or take weights trained for these."
        )
    if tuple(net.classes) != tuple(data.classes):
        different = [pair for pair in zip(net.classes, data.classes, strict=True) if pair[0] != pair[1]]
        logger.warning(
            f"class names differ in {len(different)} of {len(data.classes)} places, first '{different[0][0]}' in the model and "
            f"'{different[0][1]}' in the data; labels are compared by number"
        )


@contextmanager
def _on_device(net: DeepLab, device: str | torch.device) -> Iterator[torch.device]:
    """Move the model for the evaluation, and back afterwards."""
    home = next(net.parameters()).device
    chosen = choose_device(device, net)
    net.to(chosen)
    try:
        yield chosen
    finally:
        net.to(home)


@contextmanager
def _with_output_stride(net: DeepLab, output_stride: int | None) -> Iterator[None]:
    before = net.output_stride
    if output_stride is not None:
        net.set_output_stride(output_stride)
    try:
        yield
    finally:
        net.set_output_stride(before)
