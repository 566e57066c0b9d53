"""How good a network is on a labelled data set: predict every picture at its own resolution, count, report."""

import datetime
import math
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from types import TracebackType
from typing import Generic, ParamSpec, Self

import torch
from tqdm import tqdm

import deeplabzoo
from deeplabzoo.checkpoints.native import tensors_sha256
from deeplabzoo.data.classes import subset_note
from deeplabzoo.data.dataset import Sample, SegmentationDataset, build_dataset
from deeplabzoo.data.image_io import Labels, Pixels
from deeplabzoo.device import choose_device, eval_mode
from deeplabzoo.errors import DataError, UsageError
from deeplabzoo.evaluation.metrics import ConfusionMatrix
from deeplabzoo.evaluation.report import Protocol, Report, hardware, image_list_sha256
from deeplabzoo.log import logger
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.models.encoder_table import short_name
from deeplabzoo.optimization.optimized_model import OptimizedDeepLab, is_optimizable, optimize
from deeplabzoo.processing.preprocessing import image_labels, image_probabilities, prepare

# Reading the next pictures, and counting the last one, while the network is busy with this one.
#
# Decoding and counting hold the Python lock for moments only, so threads suffice: no picture is copied between processes, and
# the network's own threads stay as they are.


Arguments = ParamSpec("Arguments")


def prefetch(
    data: SegmentationDataset, indices: Iterable[int], *, num_threads: int = 1, prefetch_size: int = 2
) -> Generator[Sample, None, None]:
    """Yield `data[i]` for each of `indices`, in their order, while `num_threads` threads read the next ones.

    At most `prefetch_size` pictures wait, so memory is bounded. What reading a picture raises is raised at that picture's turn,
    when all before it have been yielded. Close the generator (`contextlib.closing`) to stop early: it waits for what is being
    read, and no further picture is begun.
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
    """Calls `work` in a thread of its own, one call at a time and in order, a call behind the caller.

    What a call raises is raised by the next one, or at the end of the `with` block; after it, all calls are done.
    """

    def __init__(self, work: Callable[Arguments, object]) -> None:
        self._work = work
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="deeplabzoo-behind")
        self._last: Future[object] | None = None

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        """Wait for the call before, then begin this one."""
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


_ONE_CLASS_FRACTION = 0.99
"""Above this share of predictions in one class that has fewer true pixels than that, the user is told (asks.md, theme N)."""


def evaluate(
    net: DeepLab | OptimizedDeepLab,
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
) -> Report:
    """Score `net` on a split of a data set: a name (`voc`, `camvid`, `folder`) with its root, or an opened data set.

    Predictions are brought to the size of the labels, never the labels to the predictions. `scales` and `flip` average softmax
    outputs (DeepLabV3, section 4.1); `output_stride` is switched for the evaluation and put back; `limit` takes the first so
    many pictures, and the report then says so. The report names the model as `model`, or else as the network knows itself.

    The network runs in its inference form, by `engine` and in `precision` as `DeepLab.optimize` takes them; None runs it as it
    is. The default differs from that by rounding alone: mIoU was equal to four decimals on real pictures. An OptimizedDeepLab
    brings its own engine, and stays at its own output stride.

    `seen` is called with each sample and the labels predicted for it, at the size of its own labels.

    Raises UsageError for settings that make no sense or a network with another number of classes than the data, and whatever
    reading the data raises: DataError, ImageError.
    """
    given = None
    if isinstance(net, OptimizedDeepLab):
        given, net = net, _source_model(net, output_stride)
    data = _open_data(net, data, root, split)
    _check(net, data, scales, limit)
    count = min(limit or len(data), len(data))
    matrix = ConfusionMatrix(len(data.classes), data.ignore_index)
    started = time.perf_counter()
    place = device if given is None else given.device
    with _on_device(net, place) as chosen, _with_output_stride(net, output_stride), eval_mode(net):
        runs: DeepLab | OptimizedDeepLab = net
        if given is not None:
            runs = given
        elif engine is not None and is_optimizable(net):
            runs = optimize(net, engine, precision=precision)
        with closing(prefetch(data, range(count))) as samples, BackgroundWorker(matrix.update) as counted:
            for sample in tqdm(samples, total=count, desc="evaluate", unit="image", disable=None if progress else True):
                predicted = _predict_labels(runs, sample.image, scales, flip)
                if seen is not None:
                    seen(sample, predicted)
                counted(predicted, sample.labels)
        seconds = time.perf_counter() - started
        if not matrix.counts.any():
            raise DataError(f"All pixels of these {count} pictures are void ({data.ignore_index}); there is nothing to score.")
        _warn_if_one_class(matrix, data.classes)
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
            ),
            classes=tuple(data.classes),
            scores=matrix.scores(),
            confusion_matrix=tuple(tuple(row) for row in matrix.counts.tolist()),
            versions=_versions(),
            hardware=hardware(chosen),
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            seconds=round(seconds, 3),
        )


def _source_model(fast: OptimizedDeepLab, output_stride: int | None) -> DeepLab:
    """Return the network of an optimised one, whose tensors the report names; raises UsageError if they are others by now."""
    if output_stride not in (None, fast.output_stride):
        raise UsageError(f"This optimised network runs at output stride {fast.output_stride}; optimise it anew at another one.")
    if not fast.current:
        raise UsageError(
            "The network has changed since it was optimised, so its score would be of other weights; optimise anew."
        )
    return fast.net


def _subset_note(count: int, whole: int) -> str | None:
    return None if count == whole else f"the first {count} of {whole} images"


def _open_data(
    net: DeepLab, data: str | SegmentationDataset, root: str | os.PathLike[str] | None, split: str
) -> SegmentationDataset:
    if not isinstance(data, str):
        return data
    if root is None:
        raise UsageError(f"evaluate needs root=, the folder that holds '{data}'.")
    return build_dataset(data, root, split, classes=net.classes)


def _check(net: DeepLab, data: SegmentationDataset, scales: Sequence[float], limit: int | None) -> None:
    if not scales or not all(math.isfinite(scale) and scale > 0 for scale in scales):
        raise UsageError(f"scales must be numbers above 0, such as 0.5 1 1.5, not {tuple(scales)!r}.")
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be at least 1, not {limit!r}.")
    if len(data) == 0:
        raise DataError(f"The split '{data.split}' of '{data.name}' holds no picture.")
    if len(net.classes) != len(data.classes):
        raise UsageError(
            f"The model has {len(net.classes)} classes but {data.name} {data.split} has {len(data.classes)}; "
            "evaluate it on data of its own classes, or take weights trained for these."
        )
    if tuple(net.classes) != tuple(data.classes):
        different = [pair for pair in zip(net.classes, data.classes, strict=True) if pair[0] != pair[1]]
        logger.info(
            f"class names differ in {len(different)} of {len(data.classes)} places, first '{different[0][0]}' in the model and "
            f"'{different[0][1]}' in the data; labels are compared by number."
        )


def _predict_labels(net: DeepLab | OptimizedDeepLab, image_HWC: Pixels, scales: Sequence[float], flip: bool) -> Labels:
    """Labels at the picture's own size; a single pass needs no probabilities, and no full-size logits either."""
    if len(scales) == 1 and not flip:
        return image_labels(net, prepare(image_HWC, net.preprocessing, scale=scales[0], channels=net.config.in_chans))
    labels: Labels = image_probabilities(net, image_HWC, scales, flip)[0].argmax(dim=0).cpu().numpy()
    return labels


@contextmanager
def _on_device(net: DeepLab, device: str | torch.device) -> Iterator[torch.device]:
    """Move the network for the evaluation, and back to where its owner had it."""
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


def _warn_if_one_class(matrix: ConfusionMatrix, classes: Sequence[str]) -> None:
    total = matrix.counts.sum()
    predicted, true = matrix.counts.sum(axis=0) / total, matrix.counts.sum(axis=1) / total
    most = int(predicted.argmax())
    if predicted[most] > _ONE_CLASS_FRACTION > true[most]:
        logger.info(
            f"{100 * predicted[most]:.1f} % of all predictions are '{classes[most]}', which has {100 * true[most]:.1f} % of "
            "the true pixels: the model seems untrained, or the input is not what it expects."
        )


def _versions() -> dict[str, str]:
    import timm

    return {"deeplabzoo": deeplabzoo.__version__, "torch": torch.__version__, "timm": timm.__version__}
