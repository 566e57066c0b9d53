"""`python -m deeplabzoo.benchmark`: the same network on every side, records that can be repeated, tables that nobody types."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks.suite import tables
from benchmarks.suite.__main__ import main as suite
from deeplabzoo.benchmark import compare, timing
from deeplabzoo.benchmark.backends import counterpart, open_backend
from deeplabzoo.benchmark.models import init_batch_norm_stats, open_model, synthetic_images
from deeplabzoo.benchmark.record import Record, Row, Spread, all_threads_flush_denormals, read_record, text_table
from deeplabzoo.benchmark.timing import Worker, interleave_timings, peak_of
from deeplabzoo.cli import benchmark
from deeplabzoo.errors import UsageError
from deeplabzoo.models.config import DeepLabConfig
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.optimization.cpu_runtime import flush_denormals

ROOT = Path(__file__).resolve().parents[2]
SMALL_SMP = "smp:deeplabv3plus_mobilenet_v2"
TINY = "--engine plain --size 64 64 --pairs 1 --threads 1 --device cpu"


@pytest.fixture(scope="module")
def of_torchvision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of ours that torchvision's MobileNetV3 builder also makes, of few classes."""
    net = open_model("deeplabv3_mobilenetv3_voc", seed=0).net
    path = tmp_path_factory.mktemp("benchmark") / "net.safetensors"
    net.save(path)
    return path


@pytest.fixture(scope="module")
def written(of_torchvision: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """One run of the command against torchvision, with memory, a record and a chart."""
    place = tmp_path_factory.mktemp("run")
    record, chart = place / "benchmarks" / "run.json", place / "chart.png"
    words = [str(of_torchvision), *TINY.split(), "--peers", "torchvision", "--memory", "--tasks", "labels"]
    threads = torch.get_num_threads()
    try:
        assert benchmark.main([*words, "--json", str(record), "--chart", str(chart)]) == 0
    finally:
        torch.set_num_threads(threads)
    return record, chart, " ".join(words)


@pytest.mark.slow
def test_a_run_records_what_is_needed_to_reproduce_it(written: tuple[Path, Path, str]) -> None:
    """Times, ratio, agreement, memory, machine, versions, commit, command: a ratio without them is an anecdote."""
    file, chart, words = written
    record = read_record(file)
    times, memory = record.rows
    assert (times.task, times.side, times.peer) == ("image -> labels", "plain fp32", "torchvision, eager")
    assert times.ms
    assert times.peer_ms
    assert times.ratio
    assert times.ratio.median == pytest.approx(times.peer_ms.median / times.ms.median)  # of one pair
    assert times.agreement
    assert times.agreement >= 0.999
    assert {"images_per_s", "gflop", "gflop_per_s", "share_of_gemm_peak", "start_s"} == set(times.figures)
    assert memory.task.startswith("peak memory")
    assert min(memory.figures[name] for name in ("peak_mb", "peer_peak_mb")) > 1
    assert min(memory.figures[name] for name in ("loaded_mb", "peer_loaded_mb")) > 40  # 11 M parameters and torch itself
    assert {"torch", "torchvision", "python", "deeplabzoo"} <= set(record.versions)
    assert (record.threads, record.precision, record.layout) == (1, "fp32", "contiguous")
    assert record.settings["denormals"] == "zero in every thread"
    assert record.settings["gemm_gflop_per_s"]["1"] > 1
    assert record.command.startswith("python -m deeplabzoo.benchmark ")
    assert words.split()[1:] == record.command.split()[4 : 4 + len(words.split()) - 1]
    assert record.hardware["cpu"]
    with Image.open(chart) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 200
        assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 10


def made_record() -> Record:
    """Two turns against a peer, and what else a record needs."""
    row = Row.paired(
        [3.0, 2.0],
        [6.0, 8.0],
        name="net",
        task="image -> labels",
        side="torch fp32",
        peer="torchvision, eager",
        threads=2,
        size=(5, 7),
        agreement=0.99996,
        figures={"images_per_s": 400.0, "share_of_gemm_peak": 0.5},
        note="random",
    )
    return Record(
        rows=(row,),
        command="python -m deeplabzoo.benchmark net",
        precision="fp32",
        layout="channels-last",
        threads=2,
        seed=0,
        versions={"torch": "2.15.0+cpu"},
        hardware={"cpu": "A (R) CPU @ 3 GHz"},
        settings={"denormals": "zero in every thread", "gemm_gflop_per_s": {"1": 100.0, "2": 190.0}},
        date="2026-01-01T00:00:00+00:00",
        commit=None,
    )


def test_the_name_of_a_record_states_its_conditions() -> None:
    """Date, hardware, threads, torch, precision and layout can be read from a list of files (timm's habit)."""
    assert made_record().file_name() == "2026-01-01_a-r-cpu-3-ghz-2t_torch-2.15.0+cpu_fp32_channels-last.json"


def test_tables_are_written_from_records(tmp_path: Path) -> None:
    """A document's table holds the record's figures and its command; writing it again changes nothing."""
    record = made_record()
    file = tmp_path / "records" / "run.json"
    file.parent.mkdir()
    record.write(file)
    document = tmp_path / "speed.md"
    document.write_text("before\n<!-- speed-table:begin -->\nold\n<!-- speed-table:end -->\nafter\n")
    assert suite(["table", "--records", str(file.parent), "--write", str(document)]) == 0
    text = document.read_text()
    assert "| 3.00 (2.50 to 3.50) | 99.996 % | 50 % |" in text
    assert "GEMM peak 100 GFLOP/s with 1 thread, 190 GFLOP/s with 2 threads" in text
    assert f"Reproduce: `{record.command}`" in text
    assert "old" not in text
    assert text.startswith("before")
    assert suite(["table", "--records", str(file.parent), "--write", str(document)]) == 0
    assert document.read_text() == text


@pytest.mark.parametrize("document", ["benchmarks/README.md", "docs/speed.md", "docs/export.md", "docs/demo.md"])
def test_the_documents_hold_what_the_records_say(document: str, tmp_path: Path) -> None:
    """No number is typed."""
    copy = tmp_path / "copy.md"
    copy.write_text((ROOT / document).read_text(encoding="utf-8"), encoding="utf-8")
    tables.fill(copy, tables.tables(ROOT / "benchmarks"))
    assert copy.read_text(encoding="utf-8") == (ROOT / document).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "peer", ["torchvision", "deeplabzoo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("onnxruntime", "openvino"))]
)
def test_every_peer_of_torchvisions_model_answers_as_we_do(of_torchvision: Path, peer: str) -> None:
    """Same weights, same pictures: logits at full size agree, and labels are their arg-max."""
    net = open_model(str(of_torchvision), seed=0).net
    image_BCHW = synthetic_images(1, (64, 96), seed=1)
    side = open_backend(peer, net, image_BCHW, threads=1)
    ours_BCHW = open_backend("plain:fp32", net, image_BCHW, threads=1).logits(image_BCHW)
    logits_BCHW = torch.as_tensor(side.logits(image_BCHW))
    assert logits_BCHW.shape == ours_BCHW.shape == (1, 21, 64, 96)
    assert float((logits_BCHW - ours_BCHW).abs().max()) < 1e-3 * float(ours_BCHW.std())
    assert torch.equal(torch.as_tensor(side.labels(image_BCHW)), logits_BCHW.argmax(1))


@pytest.mark.parametrize(
    ("name", "peer"),
    [(SMALL_SMP, "smp"), pytest.param("deeplabv3_mobilenetv2_voc.google", "transformers", marks=pytest.mark.slow)],
)
def test_other_libraries_get_the_same_model(name: str, peer: str) -> None:
    """SMP's and transformers' own classes, loaded by their own loaders, answer as ours does."""
    net = open_model(name, seed=0).net
    image_BCHW = synthetic_images(1, (64, 96), seed=1)
    with torch.inference_mode():
        theirs_BCHW, ours_BCHW = counterpart(net, peer)(image_BCHW), net(image_BCHW)
    assert theirs_BCHW.shape == ours_BCHW.shape
    assert float((theirs_BCHW - ours_BCHW).abs().max()) < 1e-3 * float(ours_BCHW.std())


def test_made_weights_keep_the_signal_alive() -> None:
    """Flat logits would measure ties and denormals: after the norms are estimated, labels differ from place to place."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = DeepLab(DeepLabConfig(architecture="deeplabv3plus", encoder="resnet18", num_classes=21))
    init_batch_norm_stats(net, seed=0)
    deviations = []
    for module in net.encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            if not module.weight.any():  # timm's residual branches begin as nothing
                continue
            module.register_forward_hook(lambda *call: deviations.append(float(call[2].std())))
    with torch.inference_mode():
        labels_BHW = net(synthetic_images(1, (96, 96), seed=3)).argmax(1)
    assert len(labels_BHW.unique()) > 2
    assert all(0.1 < deviation < 10 for deviation in deviations)
    assert all(module.momentum == 0.1 for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d))


def test_backends_are_timed_interleaved() -> None:
    """A B A B, every side called before the first turn; a ratio is taken within its turn."""
    order: list[str] = []
    assert interleave_timings({"a": lambda: order.append("a") or 2.0, "b": lambda: order.append("b") or 3.0}, 3) == {
        "a": [2.0] * 3,
        "b": [3.0] * 3,
    }
    assert order == ["a", "b"] * 3
    row = Row.paired([1.0, 2.0, 4.0], [2.0, 6.0, 4.0], name="n", task="t", side="s", threads=1)
    assert row.ratio == Spread(2.0, 1.5, 2.5)  # of 2, 3 and 1
    with pytest.raises(UsageError, match="--pairs must be at least 1"):
        interleave_timings({}, 0)


def test_denormals_are_zero_inside_and_come_back() -> None:
    """Both sides must be spared them, and code after the benchmark must not inherit it."""
    with flush_denormals():
        assert all_threads_flush_denormals()
    assert float(torch.tensor([1e-39]) * 1.0) != 0


def test_the_peak_of_a_call_is_what_it_needed() -> None:
    """200 MB that a call takes and lets go are seen, and what was there before is not counted."""
    ballast = torch.ones(25_000_000)  # 100 MB
    found = peak_of(lambda: torch.ones(50_000_000).sum(), torch.device("cpu"))
    assert 190 < found["peak_mb"] < 230
    assert found["loaded_mb"] > ballast.nbytes / 1e6


def test_operations_are_counted_as_the_model_does_them() -> None:
    """A 3x3 convolution of 4 to 8 channels on 10 x 10 cells: two operations a tap."""
    conv = torch.nn.Conv2d(4, 8, 3, padding=1)
    assert timing.gflop_of(conv, torch.zeros(1, 4, 10, 10)) == pytest.approx(2 * 4 * 8 * 9 * 100 / 1e9)


def test_models_that_differ_are_not_timed(of_torchvision: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ratio between two different networks says nothing, so labels are compared first."""

    class Fake:
        def __init__(self, given: dict[str, Any]) -> None:
            self.facts = {"title": given["side"], "start_s": 0.0}
            self._value = 1 if given["side"] == "torchvision" else 0

        def __enter__(self) -> "Fake":
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def labels(self) -> Any:
            return torch.full((1, 64, 64), self._value).numpy()

        def time_call(self, task: str) -> float:
            raise AssertionError("timed")

    monkeypatch.setattr(compare, "Worker", Fake)
    plan = compare.ComparisonConfig(
        ours=("plain:fp32",),
        peers=("torchvision",),
        sizes=((64, 64),),
        batches=(1,),
        tasks=("labels",),
        device=torch.device("cpu"),
        threads=1,
        pairs=1,
        seed=0,
        peaks={},
    )
    with pytest.raises(UsageError, match=r"agree on only 0\.00 % of the labels"):
        compare.compare(open_model(str(of_torchvision), 0), plan, (64, 64), 1)


@pytest.mark.slow
def test_a_backend_that_cannot_start_is_one_sentence(tmp_path: Path) -> None:
    """What goes wrong in the other process is told here, whether it was said or it died."""
    given = {"side": "plain:fp32", "weights": str(tmp_path / "none.safetensors"), "size": [64, 64], "batch": 1, "threads": 1}
    rest = {"device": "cpu", "seed": 0, "peer_precision": "fp32", "memory": False, "calibration": None}
    with pytest.raises(UsageError, match="There is no weights file"), Worker(given | rest):
        pass
    with pytest.raises(UsageError, match="ended early: KeyError: 'device'"), Worker(given):
        pass


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("", "name a MODEL"),
        ("deeplabv3_resnet18 --peers torchvison", "Unknown peer 'torchvison'.* Did you mean 'torchvision'"),
        ("deeplabv3_resnet18 --peers torchvision", "No peer of torchvision has a counterpart of deeplabv3_resnet18"),
        ("deeplabv3_resnet18 --size 16 16", "--size 16 is too small"),
        ("deeplabv3_resnet18 --size 64", "heights and widths in pairs"),
        ("deeplabv3_resnet18 --pairs 0", "--pairs 0 measures no times"),
        ("deeplabv3_resnet18 --threads 0", "--threads must be at least 1"),
        ("deeplabv3_resnet18 --chart c.jpg", r"must end in \.png"),
        ("deeplabv3_resnet18 --engine plain --precision int8", "'plain' is the model as it was loaded"),
        ("deeplabv3_resnet18 --engine opnvino", "Did you mean 'openvino'"),
        ("deeplabv3_resnet5O", "resnet50"),
        ("smp:deeplabv3plus_resnet5O", "Did you mean 'resnet50'"),
        ("smp:deeplabv3plus_resnet18 --engine plain --peers smp --size 65 64", "only sizes that 16 divides, .*--size 64 64"),
        ("deeplabv3_resnet18 --data voc", "--data voc needs --root"),
        ("deeplabv3_resnet18 --batch-size 0", "--batch-size must be at least 1"),
    ],
)
def test_wrong_calls_are_sentences(
    words: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that says what was expected; nothing is measured, nothing is written."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    try:
        assert benchmark.main(words.split()) != 0
    finally:
        torch.set_num_threads(threads)
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert re.search(sentence, error[0])
    assert list(tmp_path.iterdir()) == []


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With the command that installs it."""
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    assert benchmark.main(["deeplabv3_resnet18", "--peers", "openvino"]) != 0
    assert 'pip install "deeplabzoo[openvino]"' in capsys.readouterr().err


def test_what_is_no_record_is_refused(tmp_path: Path) -> None:
    """A table must not be made of something else."""
    (tmp_path / "x.json").write_text(json.dumps({"kind": "another", "rows": []}))
    with pytest.raises(UsageError, match="is not a record"):
        read_record(tmp_path / "x.json")


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    """Nothing of a row is lost between the run and the table."""
    record = made_record()
    record.write(tmp_path / "r.json")
    assert read_record(tmp_path / "r.json") == record
    alone = Row.paired([3.0, 2.0], None, name="n", task="t", side="s", threads=2)
    assert "2.50" in text_table([alone])
    assert "peer" not in text_table([alone]).splitlines()[0]  # columns that nothing fills are left out
