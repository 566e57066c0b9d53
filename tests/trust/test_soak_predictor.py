"""A predictor that works for days: ten thousand images of mixed sizes leave memory, files and threads as they were."""

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from memory_chart import draw_memory
from PIL import Image
from resources import Held
from trust_record import FOLDER, TrustRecord, write_record

import deeplabzoo
from deeplabzoo.data.image_io import Pixels
from deeplabzoo.errors import ImageError
from deeplabzoo.inference.predictor import Predictor, Result

MODEL = "deeplabv3plus_mobilenetv2_camvid"
PREDICTIONS = 10_000
EVERY = 100
"""Predictions between two looks at the process."""
SIDES = (24, 320)
MOST_GROWTH_MB = 20.0
"""Over the second half of the run; one label map kept of each image would be 60 MB, one image of each 180 MB."""
CHART = FOLDER.parents[1] / "docs" / "images" / "predictor_memory.png"
PHOTO = FOLDER.parents[1] / "docs" / "images" / "palace.jpg"


def photos(count: int) -> Iterator[Pixels]:
    """Cuts of a real image, small and large ones, upright and wide: hardly two of one size."""
    generator = np.random.default_rng(0)
    with Image.open(PHOTO) as opened:
        whole_HWC = np.asarray(opened.convert("RGB"))
    for _ in range(count):
        height, width = (round(math.exp(one)) for one in generator.uniform(*np.log(SIDES), size=2))
        top = generator.integers(0, whole_HWC.shape[0] - height + 1)
        left = generator.integers(0, whole_HWC.shape[1] - width + 1)
        yield np.ascontiguousarray(whole_HWC[top : top + height, left : left + width])


class Work:
    """The ways in which programs use a predictor, one after the other."""

    def __init__(self, folder: Path) -> None:
        net = deeplabzoo.create(MODEL, pretrained=True)
        self.whole = Predictor(net, "cpu")
        self.tiled = Predictor(net, "cpu", tile=129)
        self.folder = folder
        self.refused = 0

    def once(self, number: int, image_HWC: Pixels) -> Result:
        """Label one image that comes as an array, a Pillow image or a file; now and then save, tile, or meet a damaged file."""
        predictor = self.tiled if number % 20 == 19 else self.whole
        photo, result = self.folder / f"photo{('.jpg', '.png')[number % 2]}", self.folder / "result.png"
        match number % 3:
            case 0:
                answer = predictor(image_HWC)
            case 1:
                answer = predictor(Image.fromarray(image_HWC))
            case _:
                Image.fromarray(image_HWC).save(photo)
                answer = predictor(photo)
        assert answer.labels.shape == image_HWC.shape[:2]
        if number % 10 == 5:
            answer.overlay()
            answer.save(result, ("overlay", "labels")[number % 20 == 5])
        if number % 50 == 2:
            photo.write_bytes(photo.read_bytes()[:60])
            with pytest.raises(ImageError):
                self.whole(photo)
            self.refused += 1
        return answer


def test_a_hundred_predictions_leave_no_file_and_no_thread(tmp_path: Path) -> None:
    """What a long run would lose, a short one loses a little of: open files, threads, Python's objects."""
    work = Work(tmp_path)
    images = [np.ascontiguousarray(image_HWC[:64, :64]) for image_HWC in photos(20)]
    for number in range(60):
        work.once(number, images[number % 20])
    before = Held.now()
    for number in range(60):
        work.once(number, images[number % 20])
    after = Held.now()
    assert (after.files, after.threads) == (before.files, before.threads)
    assert after.objects - before.objects < 600, "ten objects kept of each prediction"


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_ten_thousand_predictions_keep_memory_flat(tmp_path: Path) -> None:
    """A service that labels images all day needs as much memory in the evening as at noon, and still says the same."""
    started = time.perf_counter()
    work = Work(tmp_path)
    known = [(image_HWC, work.whole(image_HWC).labels) for image_HWC in photos(10)]
    looks: list[tuple[int, Held]] = []
    for number, image_HWC in enumerate(photos(PREDICTIONS), start=1):
        work.once(number, image_HWC)
        if number % EVERY == 0:
            looks.append((number, Held.now()))
        if number % (PREDICTIONS // 10) == 0:
            for image_HWC, labels_HW in known:
                np.testing.assert_array_equal(work.whole(image_HWC).labels, labels_HW)
    resident = [held.resident_mb for _, held in looks]
    tenth = len(looks) // 10
    growth_mb = float(np.mean(resident[-tenth:]) - np.mean(resident[4 * tenth : 5 * tenth]))
    early, late = looks[2 * tenth][1], looks[-1][1]
    flat = growth_mb < MOST_GROWTH_MB
    unleaked = (late.files, late.threads) == (early.files, early.threads)
    record = TrustRecord(
        name="predictor_soak",
        area="servers",
        what=f"{PREDICTIONS} photos of mixed sizes and kinds labelled in one process",
        command="python -m pytest -m soak tests/trust/test_soak_predictor.py",
        seconds=round(time.perf_counter() - started, 1),
        inputs=PREDICTIONS + work.refused,
        faults=work.refused,
        survived=work.refused,
        details={
            "title": f"{MODEL}, {PREDICTIONS} photos of {SIDES[0]} to {SIDES[1]} pixels a side",
            "model": MODEL,
            "sides_pixels": SIDES,
            "growth_mb_of_the_second_half": round(growth_mb, 2),
            "most_growth_mb_allowed": MOST_GROWTH_MB,
            "resident_mb_after_a_fifth": early.resident_mb,
            "resident_mb_at_the_end": late.resident_mb,
            "resident_mb_largest": max(resident),
            "files_after_a_fifth_and_at_the_end": [early.files, late.files],
            "threads_after_a_fifth_and_at_the_end": [early.threads, late.threads],
            "python_objects_after_a_fifth_and_at_the_end": [early.objects, late.objects],
            "damaged_files_refused": work.refused,
            "samples": [[number, held.resident_mb] for number, held in looks],
        },
    )
    assert flat, f"{growth_mb:.1f} MB more in the second half"
    assert unleaked, f"{early} became {late}"
    write_record(record)
    if os.environ.get("DEEPLABZOO_RECORD") == "1":
        draw_memory(json.loads((FOLDER / "predictor_soak.json").read_text(encoding="utf-8")), CHART)
