"""One predictor under eight threads for minutes, with every engine; and in worker processes, forked and spawned."""

import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_concurrency import PHOTO, THREADS, at_once, quick_switches
from torch.utils.data import DataLoader, Dataset
from trust_record import TrustRecord, write_record

import deeplabzoo
from deeplabzoo.data.image_io import Labels, Pixels
from deeplabzoo.inference.predictor import Predictor
from deeplabzoo.models.deeplab import DeepLab

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

ROUNDS = 12
"""Times that each thread labels all images."""
COLLISIONS = 20
"""Predictors whose first calls come from eight threads together."""
SIZES = ((48, 64), (64, 48), (97, 65), (33, 120), (80, 80), (65, 65), (120, 40), (130, 140))
TILES = {"tile": 65, "overlap": 16}


class Labelled(Dataset[torch.Tensor]):
    """Images labelled by whoever asks for them: in a worker, by the worker's copy of the predictor."""

    def __init__(self, predictor: Predictor, photos: list[Pixels]) -> None:
        self.predictor, self.photos = predictor, photos

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.predictor(self.photos[index]).labels)


class Tally:
    """Answers compared and answers that were others than those of one thread."""

    def __init__(self) -> None:
        self.compared, self.wrong = Counter[str](), Counter[str]()

    def add(self, name: str, found: list[Labels], expected: list[Labels]) -> None:
        for one, another in zip(found, expected, strict=True):
            self.compared[name] += 1
            self.wrong[name] += int(not np.array_equal(one, another))


def test_threads_and_workers_answer_as_one_thread_does(tmp_path: Path) -> None:
    """Every answer of every thread, engine and worker is compared, pixel by pixel, with that of one thread alone."""
    started = time.perf_counter()
    net = deeplabzoo.create("deeplabv3plus_mobilenetv2_camvid", pretrained=True)
    photos, tally = cuts(), Tally()
    for engine in ("torch", "onnxruntime", "openvino"):
        under_threads(tally, f"engine {engine}", Predictor(net, "cpu", engine), photos)
    one_size = [photos[0], photos[0][::-1].copy(), photos[0][:, ::-1].copy()]
    under_threads(tally, "engine compiled", Predictor(net.optimize("compiled", size=SIZES[0])), one_size)
    under_threads(tally, "tiles", Predictor(net, "cpu", **TILES), photos)  # type: ignore[arg-type]
    collide(tally, net, photos[0])
    for context in ("fork", "spawn"):
        in_workers(tally, context, Predictor(net, "cpu"), photos)
    assert not +tally.wrong
    collisions = tally.compared["first calls together"] // THREADS
    write_record(
        TrustRecord(
            name="threads",
            area="servers",
            what="one predictor used from eight threads, by every engine, and from forked and spawned workers",
            command="python -m pytest -m soak tests/trust/test_soak_threads.py",
            seconds=round(time.perf_counter() - started, 1),
            inputs=sum(tally.compared.values()),
            faults=collisions,
            survived=collisions - tally.wrong["first calls together"],
            details={
                "threads_at_once": THREADS,
                "answers_compared": dict(tally.compared),
                "answers_unlike_one_thread": sum(tally.wrong.values()),
            },
        )
    )


def cuts() -> list[Pixels]:
    with Image.open(PHOTO) as opened:
        whole_HWC = np.asarray(opened.convert("RGB"))
    return [np.ascontiguousarray(whole_HWC[20 * n : 20 * n + h, 30 * n : 30 * n + w]) for n, (h, w) in enumerate(SIZES)]


def under_threads(tally: Tally, name: str, predictor: Predictor, photos: list[Pixels]) -> None:
    """Each thread begins with another image; sizes come back in every round, so that plans for a size are made and dropped."""
    expected = [predictor(photo).labels for photo in photos]

    def work(number: int) -> list[tuple[int, Labels]]:
        order = [(number + n) % len(photos) for n in range(len(photos))] * ROUNDS
        return [(index, predictor(photos[index]).labels) for index in order]

    with quick_switches():
        for found in at_once(work):
            tally.add(name, [labels_HW for _, labels_HW in found], [expected[index] for index, _ in found])


def collide(tally: Tally, net: DeepLab, photo: Pixels) -> None:
    expected = Predictor(net, "cpu")(photo).labels
    for _ in range(COLLISIONS):
        fresh = Predictor(net, "cpu")
        with quick_switches():
            found = at_once(lambda _, fresh=fresh: fresh(photo).labels)
        tally.add("first calls together", found, [expected] * THREADS)


def in_workers(tally: Tally, context: str, predictor: Predictor, photos: list[Pixels]) -> None:
    """The predictor is warm when the workers start: a fork inherits its engine, a spawned process makes its own."""
    expected = [predictor(photo).labels for photo in photos]
    loader = DataLoader(
        Labelled(predictor, photos), batch_size=None, num_workers=2, multiprocessing_context=context, persistent_workers=True
    )
    for _ in range(3):
        tally.add(f"workers, {context}", [labels_HW.numpy() for labels_HW in loader], expected)
