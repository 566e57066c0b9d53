"""One predictor, many threads: the answers of one thread, whatever engine computes them, also when the first calls collide."""

import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from helpers.color_net import ColorNet
from PIL import Image
from torch import nn

import deeplabzoo
from deeplabzoo.data.datasets.synthetic_shapes import SyntheticShapes
from deeplabzoo.data.image_io import Pixels
from deeplabzoo.device import eval_mode
from deeplabzoo.errors import DeepLabZooError
from deeplabzoo.evaluation.evaluate import prefetch
from deeplabzoo.inference.predictor import Predictor
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.optimization import torch_backend
from deeplabzoo.optimization.fused_conv import fold_batchnorm
from deeplabzoo.optimization.graph_backend import SizeSpecializedRunner, openvino_runner
from deeplabzoo.optimization.onednn import onednn_available, prepack
from deeplabzoo.processing.postprocessing import compile_postprocessing, upsample_argmax

THREADS = 8
PHOTO = Path(__file__).resolve().parents[2] / "docs" / "images" / "palace.jpg"
SIZES = ((48, 64), (64, 48), (48, 64), (97, 65), (33, 120), (48, 64), (64, 48), (80, 80))
"""Some come back, so that engines that keep a plan for each size meet it again."""
Answer = TypeVar("Answer")


def at_once(work: Callable[[int], Answer], count: int = THREADS) -> list[Answer]:
    """Return what `work(0)`, `work(1)` … give, each in a thread of its own that begins when all are there."""
    begin, answers, errors = threading.Barrier(count), dict[int, Answer](), list[BaseException]()

    def run(number: int) -> None:
        begin.wait()
        try:
            answers[number] = work(number)
        except BaseException as error:  # shown by the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [answers[number] for number in range(count)]


@contextmanager
def quick_switches() -> Iterator[None]:
    """Let threads take turns ten thousand times as often as they do: what can collide, collides."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def no_grad(forward: nn.Module, image_BCHW: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return forward(image_BCHW)


@pytest.fixture(scope="module")
def photos() -> list[Pixels]:
    with Image.open(PHOTO) as opened:
        whole_HWC = np.asarray(opened.convert("RGB"))
    return [np.ascontiguousarray(whole_HWC[40 * n : 40 * n + h, 30 * n : 30 * n + w]) for n, (h, w) in enumerate(SIZES)]


@pytest.fixture(scope="module")
def net() -> DeepLab:
    return deeplabzoo.create("deeplabv3plus_mobilenetv2_camvid", pretrained=True)


def require_same_answers(predictor: Predictor, photos: list[Pixels], repeats: int = 1) -> None:
    """Each thread labels every image, beginning at another one; all find what one thread alone finds."""
    expected = [predictor(photo).labels for photo in photos]

    def work(number: int) -> list[np.ndarray]:
        order = [(number + n) % len(photos) for n in range(len(photos))]
        found = {}
        for _ in range(repeats):
            found |= {n: predictor(photos[n]).labels for n in order}
        return [found[n] for n in range(len(photos))]

    with quick_switches():
        for found in at_once(work):
            for labels_HW, expected_HW in zip(found, expected, strict=True):
                np.testing.assert_array_equal(labels_HW, expected_HW)


def test_eight_threads_get_the_answers_of_one(net: DeepLab, photos: list[Pixels]) -> None:
    """A web service has one predictor and a thread a request; sizes are mixed, as images are."""
    require_same_answers(Predictor(net, "cpu"), photos[:4])


def test_tiles_are_cut_by_eight_threads_as_by_one(net: DeepLab, photos: list[Pixels]) -> None:
    """Each image's bands are its own: nothing of a neighbour's is blended in."""
    require_same_answers(Predictor(net, "cpu", tile=65, overlap=16), photos[3:5])


def test_the_first_calls_may_come_together(net: DeepLab, photos: list[Pixels], caplog: pytest.LogCaptureFixture) -> None:
    """A service that was just started: the form is made once, and packed once, while others wait for it."""
    caplog.set_level("INFO", "deeplabzoo")
    expected_HW = Predictor(net, "cpu")(photos[0]).labels
    caplog.clear()
    fresh = Predictor(net, "cpu")
    with quick_switches():
        for result in at_once(lambda _: fresh(photos[0])):
            np.testing.assert_array_equal(result.labels, expected_HW)
    assert sum("engine torch" in line for line in caplog.messages) == 1


def test_weights_are_packed_once_by_two_first_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that both find the weights unpacked: the second must not pack what the first has emptied."""
    if not onednn_available():
        pytest.skip("this torch has no oneDNN")
    layer = nn.Conv2d(3, 8, 3, padding=1)
    conv, image_BCHW = nn.Sequential(fold_batchnorm(layer, None, None)), torch.randn(1, 3, 9, 9)
    prepack(conv)
    reorder, calls = torch.ops.mkldnn._reorder_convolution_weight, []

    def slow(*values: Any) -> torch.Tensor:
        calls.append(values)
        time.sleep(0.05)
        return reorder(*values)

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_convolution_weight", slow)
    with torch.no_grad():
        expected = layer(image_BCHW)
    for out in at_once(lambda _: no_grad(conv, image_BCHW)):
        torch.testing.assert_close(out, expected)
    assert len(calls) == 1


def test_a_graph_for_one_size_is_planned_once() -> None:
    """Planning takes as long as several images: who comes meanwhile waits for it and does not plan the same again."""

    def open_graph(shape: tuple[int, ...] | None) -> Callable[[np.ndarray], np.ndarray]:
        opened.append(shape)
        time.sleep(0.01)
        return lambda image: image

    opened: list[tuple[int, ...] | None] = []
    runner = SizeSpecializedRunner(open_graph)
    image = np.zeros((1, 3, 4, 5), np.float32)
    at_once(lambda _: [runner(image) for _ in range(5)])
    assert opened == [None, image.shape]


def test_a_second_size_that_cannot_be_compiled_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's compiler fails for some models once sizes are open; its own error has a page and names no way out."""

    def frozen(_: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(image_BCHW: torch.Tensor) -> torch.Tensor:
            if image_BCHW.shape[-1] != 65:
                raise AssertionError("expected an int, got None\n\nSet TORCHDYNAMO_VERBOSE=1 for the stack trace")
            return image_BCHW

        return forward

    monkeypatch.setattr(torch_backend, "_compile_frozen", frozen)
    net = deeplabzoo.create("deeplabv3_resnet10t", num_classes=3, encoder_pretrained=False).eval()
    run = torch_backend.build_compiled(net, size=(33, 65))
    for _ in range(2):
        with pytest.raises(DeepLabZooError, match=r"compiled for 97 x 65 \(expected an int, got None\); use engine='torch'"):
            run(torch.zeros(1, 3, 65, 97))
    assert run(torch.zeros(1, 3, 33, 65)).shape == (1, 3, 33, 65)


def test_openvino_answers_eight_threads() -> None:
    """OpenVINO's request holds one image: without a turn, a thread got pixels of another thread's image."""
    pytest.importorskip("openvino")
    onnx = pytest.importorskip("onnx")
    sides = ["batch", 3, "height", "width"]
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, sides) for name in ("image", "low")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["image"], ["low"])], "relu", values[:1], values[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    run = openvino_runner(model.SerializeToString(), threads=1)

    def work(number: int) -> None:
        image = np.full((1, 3, 512, 512), number, np.float32)
        for _ in range(5):
            np.testing.assert_array_equal(run(image), image)

    at_once(work)


def test_a_model_in_training_mode_runs_in_eval_mode_for_all() -> None:
    """Whoever is done first must not put the model back into training mode below the others; the last one does."""
    net = ColorNet().train()
    both_in, one_out = threading.Barrier(2), threading.Event()

    def work(number: int) -> None:
        with eval_mode(net):
            both_in.wait()
            if number == 1:
                one_out.wait()
                assert not net.training
                assert not net.norm.training
        one_out.set()

    at_once(work, 2)
    assert net.training
    assert net.norm.training


def test_flags_come_back_after_eight_threads() -> None:
    """The predictor borrows a model that is being trained, whichever of its threads ends last."""
    net = ColorNet().train()
    predictor = Predictor(net, "cpu")
    image = np.zeros((40, 60, 3), np.uint8)
    with quick_switches():
        at_once(lambda _: [predictor(image) for _ in range(12)])
    assert not any(net.seen_training)
    assert net.training
    assert net.norm.training


def test_read_ahead_serves_several_loops_over_one_data_set() -> None:
    """Two evaluations over the same data do not take each other's images."""
    data = SyntheticShapes("val", (24, 24), 12)
    expected = [data[index].image for index in range(12)]

    def work(number: int) -> None:
        order = list(range(number, 12)) + list(range(number))
        for index, sample in zip(order, prefetch(data, order, num_threads=2), strict=True):
            np.testing.assert_array_equal(sample.image, expected[index])

    at_once(work, 4)


@pytest.mark.parametrize("warm", [False, True])
def test_a_predictor_travels_to_another_process(photos: list[Pixels], warm: bool) -> None:
    """Spawned workers get a copy; what an engine holds stays here and is made again there, also after the first image."""
    predictor = Predictor(deeplabzoo.create("deeplabv3_resnet10t", num_classes=3, encoder_pretrained=False).eval(), "cpu")
    expected = predictor(photos[0]).labels if warm else None
    there = pickle.loads(pickle.dumps(predictor))
    np.testing.assert_array_equal(there(photos[0]).labels, predictor(photos[0]).labels if expected is None else expected)


@pytest.mark.posix
def test_a_forked_process_labels_with_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """It inherits the pool that computes labels, but none of the pool's threads."""
    assert compile_postprocessing()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    logits_BCHW = torch.rand(1, 3, 128, 128)

    def label_threads() -> int:
        upsample_argmax(logits_BCHW, (512, 512), align_corners=False)
        return sum(one.name.startswith("deeplabzoo-labels") for one in threading.enumerate())

    assert label_threads() > 0
    child = os.fork()
    if child == 0:  # pragma: no cover - another process
        try:
            os._exit(0 if label_threads() > 0 else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _labels_in_child(predictor: Predictor, photo: Pixels, answers: int) -> None:
    os.write(answers, predictor(photo).labels.tobytes())


def test_a_fork_of_a_process_with_a_warm_predictor_can_predict(net: DeepLab, photos: list[Pixels]) -> None:
    """Servers such as gunicorn fork after loading: locks and pools of the parent's threads must not stop the child."""
    predictor = Predictor(net, "cpu")
    expected = predictor(photos[0]).labels
    reading, writing = os.pipe()
    stop = threading.Event()

    def keep_busy() -> None:
        while not stop.is_set():
            predictor(photos[0])

    busy = threading.Thread(target=keep_busy)
    busy.start()
    try:
        for _ in range(3):
            child = os.fork()
            if child == 0:  # pragma: no cover - another process
                try:
                    _labels_in_child(predictor, photos[0], writing)
                finally:
                    os._exit(0)
            found = b""
            while len(found) < expected.size:
                found += os.read(reading, expected.size - len(found))
            assert found == expected.tobytes()
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        busy.join()
        os.close(reading)
        os.close(writing)
