"""The benchmark of a training step: both sides do the same work, and no figure in its document is typed."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deeplabzoo.benchmark import training, training_backends
from deeplabzoo.benchmark.models import write_synthetic_voc
from deeplabzoo.benchmark.training import memory_of
from deeplabzoo.benchmark.training_backends import Settings, open_training_backend, write_networks
from deeplabzoo.cli import benchmark
from deeplabzoo.data.transforms import normalize_images
from deeplabzoo.errors import UsageError
from deeplabzoo.training.dataloader import Batch
from tools.docs.tables import replace_block

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("torchvision", reason="the benchmark compares with torchvision")

TINY = Settings(batch=2, crop=65)
TINY_WORDS = "--batch 2 --crop 65 --rounds 2 --steps 1 --warmup 1 --memory-steps 1 --photos 4 --longest 120 --threads 1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("benchmark")
    write_synthetic_voc(place, train=4, val=1, seed=0, longest=120)
    return place


def without_dropout(side: Any) -> nn.Module:
    """The network inside a side, with nothing left to chance."""
    net: nn.Module = side._net if isinstance(side, training_backends.TorchvisionBackend) else side._trainer.net
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return net


def test_both_backends_do_the_same_work(folder: Path) -> None:
    """A ratio between two different jobs says nothing: same outputs, same loss, same step of the weights, same pictures."""
    facts = write_networks(folder, TINY)
    assert facts["parameters"] == facts["torchvision_parameters"] > 1e7
    assert facts["largest_logit_difference"] < 1e-4 < 0.1 < facts["largest_logit"]
    ours, theirs = (open_training_backend(name, folder, TINY) for name in ("ours", "torchvision"))
    nets = [without_dropout(side) for side in (ours, theirs)]
    before = [net.state_dict() for net in nets]
    starts = [{name: tensor.clone() for name, tensor in state.items()} for state in before]
    batch = next(iter(ours.batches(1)))
    assert isinstance(batch, Batch)
    image_BCHW = normalize_images(batch.image_BCHW, nets[0].preprocessing)
    losses = [(ours.step(batch), theirs.step((image_BCHW, batch.labels_BHW.long()))) for _ in range(2)]
    for our_loss, their_loss in losses:
        assert our_loss == pytest.approx(their_loss, rel=1e-3)
    assert losses[1][0] < losses[0][0]
    weight = {"ours": "head.classifier.weight", "theirs": "classifier.4.weight"}
    steps = [net.state_dict()[name] - start[name] for net, start, name in zip(nets, starts, weight.values(), strict=True)]
    assert steps[1].abs().max() > 1e-4
    assert torch.allclose(steps[0], steps[1], rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("workers", [0, 1])
def test_both_backends_get_the_same_number_of_images(folder: Path, workers: int) -> None:
    """A turn has as many batches as asked for, all full, of the same shape, and then its loader ends."""
    settings = Settings(batch=2, crop=65, workers=workers)
    write_networks(folder, settings)
    for name in ("ours", "torchvision"):
        side = open_training_backend(name, folder, settings)
        found = [(side.num_images(batch), tuple(batch[0].shape), tuple(batch[1].shape)) for batch in side.batches(3)]
        assert found == [(2, (2, 3, 65, 65), (2, 65, 65))] * 3, name
        batch = next(iter(side.batches(1)))
        assert set(batch[1].unique().tolist()) <= {*range(21), 255}, name


@pytest.fixture
def plain_arithmetic() -> Iterator[None]:
    """The command lets denormals be zero, which other tests must not inherit."""
    yield
    torch.set_flush_denormal(False)


@pytest.mark.slow
def test_memory_is_measured_in_processes_of_their_own(folder: Path) -> None:
    """A process that starts from a large one does not count its parent's memory as its own (Linux's ru_maxrss does)."""
    write_networks(folder, TINY)
    ballast = torch.ones(2**29)  # 2 GiB
    for name in ("ours", "torchvision"):
        found = memory_of(name, folder, TINY, steps=1, threads=1)
        assert 1e8 < found["before_bytes"] < found["peak_bytes"] < ballast.nbytes


@pytest.mark.slow
def test_the_command_runs_as_documented(tmp_path: Path) -> None:
    """`python -m deeplabzoo.benchmark --train` in a checkout, in a process of its own."""
    words = [*TINY_WORDS.split(), "--sides", "torchvision", "ours", "--json", str(tmp_path / "record.json")]
    subprocess.run([sys.executable, "-m", "deeplabzoo.benchmark", "--train", *words], cwd=ROOT, check=True)
    sides = json.loads((tmp_path / "record.json").read_text())["sides"]
    assert all(side["memory"]["peak_bytes"] > side["memory"]["before_bytes"] > 1e8 for side in sides.values())


@pytest.mark.usefixtures("plain_arithmetic")
def test_the_command_writes_a_record_and_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At toy size: everything that a reader needs to measure again stands in the record, and the table says it."""
    memory = {"kind": "resident, whole process", "before_bytes": 1_000_000, "peak_bytes": 2_000_000, "steps": 1}
    monkeypatch.setattr(training, "memory_of", lambda *words, **options: memory)
    file = tmp_path / "record.json"
    assert benchmark.main(["--train", *TINY_WORDS.split(), "--sides", "torchvision", "ours", "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    assert set(record["sides"]) == {"ours", "torchvision"}
    assert record["threads"] == 1
    assert {"torch", "torchvision", "timm", "python", "deeplabzoo"} <= set(record["versions"])
    assert record["date"]
    assert record["hardware"]["cpu"]
    assert record["command"].startswith("python -m deeplabzoo.benchmark --train --batch 2")
    for side in record["sides"].values():
        assert side["images"] == 2 * 1 * 2
        assert [turn["pictures"] for turn in side["turns"]] == [2, 2]
        assert side["images_per_s"]["min"] <= side["images_per_s"]["median"] <= side["images_per_s"]["max"]
        assert side["memory"] == memory
        for turn in side["turns"]:
            assert sum(turn["data_s"]) + sum(turn["step_s"]) <= turn["seconds"]
    table = training.records_table(tmp_path)
    assert training.record_table(record) in table
    assert f"{record['sides']['ours']['images_per_s']['median']:.2f}" in table
    assert capsys.readouterr().out.strip() in table


def test_the_document_holds_what_the_records_say() -> None:
    """No number is typed: writing the tables again changes nothing."""
    document = ROOT / "benchmarks" / "README.md"
    assert replace_block(
        document, training.records_table(ROOT / "benchmarks" / "training"), training.BLOCK
    ) == document.read_text(encoding="utf-8")


def test_wrong_calls_are_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is measured for a call that cannot be meant; what is no record is named."""
    assert benchmark.main(["--train", "--rounds", "0"]) == 2
    assert "--rounds must be at least 1" in capsys.readouterr().err
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UsageError, match="not a record"):
        training.records_table(tmp_path)
