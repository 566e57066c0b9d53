"""`python -m deeplabzoo.publish`: a finished run becomes weights with figures of that very file, a row, a card, an upload."""

import copy
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from helpers.local_hub import LocalHub, local_hub
from PIL import Image

import deeplabzoo
from deeplabzoo.cli.publish import main
from deeplabzoo.cli.train import main as train
from deeplabzoo.data.dataset import build_dataset, split_hash
from deeplabzoo.data.datasets.synthetic_shapes import SyntheticShapes
from deeplabzoo.errors import WeightsError
from deeplabzoo.evaluation.reproduce import GOLDEN_HW, golden_difference, golden_input, save_golden
from deeplabzoo.hub import download as hub_module
from deeplabzoo.hub import manifest as manifest_module
from deeplabzoo.hub.http_download import sha256_of
from deeplabzoo.hub.manifest import WeightRow, read_manifest
from deeplabzoo.publish.manifest_row import initial_weights, recipe_overrides
from deeplabzoo.publish.release import not_fp16_representable, require_logits_parity, write_weights
from deeplabzoo.strict_json import decode_dataclass
from deeplabzoo.training.overrides import apply_overrides
from deeplabzoo.training.recipes import RECIPES, get_recipe
from deeplabzoo.training.run_dir import RunDir

ROOT = Path(__file__).resolve().parents[2]
PHOTO = ROOT / "docs" / "images" / "cat.jpg"
NAME = "deeplabv3plus_lcnet_050_person"
TERMS = ["--data-license", "drawn by a test"]
SMALL = ["network.head_channels=16", "network.decoder_channels=16", "network.decoder_low_level_channels=8"]


@pytest.fixture(scope="session")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures and masks with train, val and test: discs that stand for persons."""
    root = tmp_path_factory.mktemp("people")
    for split, kind, count in (("train", "train", 12), ("val", "val", 5), ("test", "val", 3)):
        drawn = SyntheticShapes(kind, (64, 80), count, classes=2, seed=7 if split == "test" else 0)
        for index in range(count):
            sample = drawn[index]
            for folder, pixels in (("images", sample.image), ("masks", sample.labels)):
                (root / split / folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(root / split / folder / f"{split}{index}.png")
    return root


@pytest.fixture(scope="session")
def run(people: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the recipe `folder` on them, long enough to find some."""
    out = tmp_path_factory.mktemp("runs") / "person"
    small = ["model=deeplabv3plus_lcnet_050", "encoder_init=false", "classes=background,person", "augmentation.crop=64,80"]
    quick = ["steps=60", "batch=4", "workers=0", "evaluations=1", "network.output_stride=8"]
    rate = ["lr=2e-2", "encoder_lr_factor=1", "ema=0", "warmup_steps=5"]
    assert train(["folder", "--data", str(people), "--out", str(out), "--set", *small, *SMALL, *quick, *rate]) == 0
    return out


@pytest.fixture(scope="session")
def shapes_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose classes are those of no class list."""
    out = tmp_path_factory.mktemp("runs") / "shapes"
    assert train(["shapes", "--out", str(out), "--set", "steps=2", "batch=2", "workers=0", "evaluations=1", *SMALL]) == 0
    return out


@pytest.fixture(scope="session")
def release(run: Path, people: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The release of `run`, with figures and a photo."""
    out = tmp_path_factory.mktemp("release") / "person"
    assert main([str(run), "--data", str(people), "--out", str(out), "--photo", str(PHOTO), *TERMS]) == 0
    return out


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """A copy of the manifest, where a project would have it."""
    (tmp_path / "project" / "weights").mkdir(parents=True)
    return Path(shutil.copy(ROOT / "weights" / "manifest.json", tmp_path / "project" / "weights"))


def row_in(folder: Path) -> WeightRow:
    return decode_dataclass(WeightRow, json.loads((folder / "row.json").read_text()), "row.json")


def test_a_release_holds_all_that_others_need(release: Path) -> None:
    """Weights, golden logits, reports, row, facts, card and pictures; no one's paths in any of them."""
    full_name = f"{NAME}.v1"
    expected = {"README.md", "config.json", "curves.png", "overlay.jpg", "row.json"}
    expected |= {
        f"{full_name}{end}" for end in (".safetensors", ".golden.safetensors", "_folder_val-5.json", "_folder_test-3.json")
    }
    assert {path.name for path in release.iterdir()} == expected
    for path in release.iterdir():
        assert str(release.parent.parent).encode() not in path.read_bytes(), path.name
        assert path.stat().st_size < 700_000


def test_the_metric_is_the_files(release: Path, people: Path) -> None:
    """Evaluating the released file again gives the row's mIoU to 0.05 points, in all and for each class."""
    row = row_in(release)
    assert isinstance(row.source, manifest_module.BundledSource)
    file = release / row.source.file
    assert (row.sha256, row.bytes) == (sha256_of(file), file.stat().st_size)
    net = deeplabzoo.load(file)
    figures = {metric.split: metric for metric in row.metrics if metric.name == "mIoU"}
    for split in ("val", "test"):
        report = deeplabzoo.evaluate(net, "folder", people, split, progress=False, device="cpu")
        assert figures[split].value == pytest.approx(100 * report.miou, abs=0.05)
        assert figures[split].protocol == str(report.protocol)
    again = deeplabzoo.evaluate(net, "folder", people, "val", progress=False, device="cpu")
    expected = {name: pytest.approx(100 * value, abs=0.05) for name, value in again.per_class.items() if value is not None}
    assert figures["val"].per_class == expected
    assert [metric.split for metric in row.metrics if metric.per_class] == ["val"]
    assert again.per_class["person"] is not None
    assert again.per_class["person"] > 0.3  # no network that calls everything background, whose figure would prove nothing
    assert row.verified == "measured here"


def test_the_reports_are_of_this_file(release: Path) -> None:
    for split, images in (("val", 5), ("test", 3)):
        report = json.loads((release / f"{NAME}.v1_folder_{split}-{images}.json").read_text())
        assert report["weights"]["sha256"] == row_in(release).sha256
        command = f"python -m deeplabzoo.evaluate {NAME}.v1.safetensors --data folder --root DIR --split {split}"
        assert (report["images"], report["command"]) == (images, command)


def test_the_row_records_its_training(release: Path, run: Path, people: Path) -> None:
    """Recipe and its changes give the run's recipe again; pictures are counted and hashed; the row prints it in a phrase."""
    row, recipe = row_in(release), RunDir(run).recipe()
    training = row.training
    assert training is not None
    assert recipe is not None
    again = apply_overrides(get_recipe(training.recipe), training.overrides).with_total_steps(12)
    assert again.digest() == recipe.digest() == training.recipe_sha256
    names = build_dataset("folder", people, "train", classes=["background", "person"]).names
    assert (training.images, training.split_sha256) == (12, split_hash(names))
    assert (training.steps, training.epochs, training.seed, training.chosen) == (60, 20.0, 0, "best")
    assert training.initial_weights == "none: random initialization"
    assert row.license.data == "drawn by a test"
    assert "trained here with recipe folder (changed) on 12 images of folder train, seed 0" in str(row)
    assert training.command.startswith("python -m deeplabzoo.train folder --root DATA --out DIR --set ")
    words = shlex.split(training.command)
    assert tuple(words[words.index("--set") + 1 :]) == training.overrides


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_changes_to_any_recipe_can_be_set_again(name: str) -> None:
    """A row's `--set` arguments stand for what was trained, whichever fields were changed; unchanged, there are none."""
    filed = get_recipe(name)
    assert recipe_overrides(filed.with_total_steps(100), 100) == ()
    changes = ["lr=0.125", "augmentation.scale=0.5,1.25", "loss=ce:1,dice:0.5", "freeze_norms=none", "network.aux_head=true"]
    for length in ("steps=77", "batch=4", "epochs=3"):
        changed = apply_overrides(filed, [*changes, length, "accumulate=1", "workers=5"]).with_total_steps(100)
        logged = recipe_overrides(changed, 100)
        assert apply_overrides(filed, logged).with_total_steps(100).digest() == changed.digest()
        assert not any(one.startswith("workers") for one in logged)


def test_initial_weights_are_named_without_their_folder(tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    file.write_bytes(b"x")
    recipe = apply_overrides(get_recipe("shapes"), [f"init={file}"])
    assert initial_weights(recipe) == f"mine.safetensors (sha256 {sha256_of(file)[:12]})"
    assert recipe_overrides(recipe, None) == ("init=mine.safetensors",)
    voc = initial_weights(get_recipe("deeplabv3plus_mobilenetv2_voc"))
    assert voc == "deeplabv3_mobilenetv2_voc.coral"


def test_the_card_says_what_the_hub_and_a_reader_ask(release: Path) -> None:
    """The Hub reads figures from the model-index; the code is two lines; pictures that it shows are there."""
    from huggingface_hub import ModelCard

    text = (release / "README.md").read_text()
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("deeplabzoo", "image-segmentation", "apache-2.0")
    assert data.model_name == f"{NAME}.v1"
    found = {one.dataset_split: one.metric_value for one in data.eval_results if one.metric_type == "mean_iou"}
    assert found == {one.split: one.value for one in row_in(release).metrics if one.name == "mIoU"}
    for line in (f'net = deeplabzoo.load("{NAME}.v1.safetensors")', "drawn by a test", "| person | ", "(overlay.jpg)"):
        assert line in text
    for picture in ("overlay.jpg", "curves.png"):
        with Image.open(release / picture) as opened:
            assert max(opened.size) <= 1000


def test_golden_logits_tell_models_apart(release: Path) -> None:
    """The same weights differ by rounding alone; a slightly changed network, another stride or another file are noticed."""
    file = release / f"{NAME}.v1.golden.safetensors"
    net = deeplabzoo.load(release / f"{NAME}.v1.safetensors")
    assert file.stat().st_size < 50_000
    assert golden_difference(net, file) < 1e-5
    changed = copy.deepcopy(net)
    with torch.no_grad():
        changed.head.classifier.bias[1] += 0.5
    assert golden_difference(changed, file) > 1e-3
    with pytest.raises(WeightsError, match="logits of shape"):
        golden_difference(deeplabzoo.create("deeplabv3plus_lcnet_050", num_classes=3, output_stride=8), file)
    net.set_output_stride(16)
    with pytest.raises(WeightsError, match="output stride 8, the network runs at 16"):
        golden_difference(net, file)
    with pytest.raises(WeightsError, match="does not hold golden logits"):
        golden_difference(net, release / f"{NAME}.v1.safetensors")


def test_the_golden_input_never_changes() -> None:
    """It is arithmetic; three values, the mean and the shape pin it."""
    image = golden_input()
    assert image.shape == (1, 3, *GOLDEN_HW)
    assert image[0, :, 0, 1].tolist() == [-1.703125, -1.046875, -0.390625]
    assert golden_input(1).shape == (1, 1, *GOLDEN_HW)
    assert float(image.abs().max()) == 2.0


def test_half_precision_keeps_what_it_cannot_hold(tmp_path: Path) -> None:
    """Overflow gives inf, a tiny variance becomes 0 and is divided by: such tensors stay float32."""
    net = deeplabzoo.create("deeplabv3plus_lcnet_050", num_classes=2)
    assert not_fp16_representable(net) == []
    state = net.state_dict()
    variance = next(name for name in state if name.endswith("running_var"))
    weight = next(name for name in state if name.endswith("classifier.weight"))
    state[variance][0], state[weight][0, 0] = 1e-7, 1e5
    assert not_fp16_representable(net) == [variance, weight]
    write_weights(net, tmp_path / "half.safetensors", "fp16", {})
    read = deeplabzoo.load(tmp_path / "half.safetensors").state_dict()
    for name in (variance, weight):
        assert torch.equal(read[name], state[name])
    save_golden(net, tmp_path / "golden.safetensors")
    assert golden_difference(deeplabzoo.load(tmp_path / "half.safetensors"), tmp_path / "golden.safetensors") < 0.01
    state[weight][0, 0] = float("nan")
    with pytest.raises(WeightsError, match="non-finite values"):
        write_weights(net, tmp_path / "half.safetensors", "fp16", {})
    for difference in (0.2, float("nan")):
        with pytest.raises(WeightsError, match="publish with --precision fp32"):
            require_logits_parity(difference, "fp16")


def test_full_precision_and_the_last_step_can_be_released(run: Path, tmp_path: Path) -> None:
    """Bit for bit the run's own tensors; without --data no figure stands in the row, and it does not claim one."""
    out = tmp_path / "out"
    assert main([str(run), "--weights", "last", "--precision", "fp32", "--out", str(out), "--tag", "plain"]) == 0
    ours = deeplabzoo.load(run / "last.safetensors").state_dict()
    theirs = deeplabzoo.load(out / f"{NAME}.plain.safetensors").state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    row = row_in(out)
    assert (row.metrics, row.verified) == ((), "layout only")
    assert row.training is not None
    assert (row.training.chosen, row.training.images, row.training.split_sha256) == ("last", None, None)
    assert "No evaluation results are available." in (out / "README.md").read_text()


def test_missing_data_is_reported(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "deeplabzoo")
    assert main([str(run), "--out", str(tmp_path / "out")]) == 0
    assert "--root was not given, so dataset 'folder' was not found" in caplog.text


def test_own_classes_are_released_without_a_row(shapes_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No manifest can list them, so config.json tells the same; asked to bundle them, the command refuses at once."""
    assert main([str(shapes_run), "--out", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out" / "row.json").exists()
    facts = json.loads((tmp_path / "out" / "config.json").read_text())
    assert facts["classes"][1:] == ["disc", "square", "triangle"]
    assert facts["metrics"][0]["split"] == "val"
    assert facts["training"]["images"] == 512
    assert facts["recipe"]["steps"] == 2
    assert main([str(shapes_run), "--manifest", str(ROOT / "weights" / "manifest.json")]) == 2
    assert "no class list" in capsys.readouterr().err


@pytest.fixture(scope="session")
def project(run: Path, people: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that bundles the run."""
    folder = tmp_path_factory.mktemp("bundling") / "project"
    (folder / "weights").mkdir(parents=True)
    manifest = shutil.copy(ROOT / "weights" / "manifest.json", folder / "weights")
    call = [str(run), "--data", str(people), "--out", str(folder.parent / "out"), "--manifest", str(manifest), *TERMS]
    assert main(call) == 0
    return folder


@pytest.fixture
def bundled(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The manifest of a copy of that project, which this process takes for its own installation."""
    weights = Path(shutil.copytree(project, tmp_path / "project")) / "weights"
    for module in (manifest_module, hub_module):
        monkeypatch.setattr(module, "weights_folder", lambda: weights)
    cached = [one for one in vars(manifest_module).values() if hasattr(one, "cache_clear")]
    for one in cached:
        one.cache_clear()
    yield weights / "manifest.json"
    for one in cached:
        one.cache_clear()


def test_a_bundled_release_is_created_by_name(bundled: Path, people: Path) -> None:
    """ModelListing, described, created offline and evaluated to the row's figure; its reports are where the row says."""
    row = next(row for row in read_manifest(bundled) if row.name == NAME)
    jsonschema.validate(json.loads(bundled.read_text()), json.loads((ROOT / "weights" / "manifest.schema.json").read_text()))
    assert row.default
    net = deeplabzoo.create(NAME, pretrained=True)
    assert (net.config, net.preprocessing) == (row.config, row.preprocessing)
    assert net.weights_source["tag"] == "v1"
    report = deeplabzoo.evaluate(net, "folder", people, "val", progress=False, device="cpu")
    assert row.metrics[0].value == pytest.approx(100 * report.miou, abs=0.05)
    assert row.metrics[0].command == f"python -m deeplabzoo.evaluate {NAME}.v1 --data folder --root DIR --split val"
    assert row.metrics[0].report == f"benchmarks/evaluations/{NAME}.v1_folder_val-5.json"
    assert (bundled.parents[1] / row.metrics[0].report).is_file()
    assert golden_difference(net, bundled.parent / f"{NAME}.v1.golden.safetensors") < 1e-5
    assert "trained here with recipe folder" in str(deeplabzoo.describe(NAME))


def test_images_of_a_data_set_stay_out_of_the_project(bundled: Path) -> None:
    """Without --photo the release folder shows a val picture; what is bundled shows none, and its card asks for none."""
    names = {path.name for path in bundled.parent.iterdir()} - {"manifest.json"}
    endings = ("safetensors", "golden.safetensors", "curves.png", "md")
    assert names == {f"{NAME}.v1.{ending}" for ending in endings}
    card = (bundled.parent / f"{NAME}.v1.md").read_text()
    assert "overlay.jpg" not in card
    assert f"({NAME}.v1.curves.png)" in card
    assert f'deeplabzoo.create("{NAME}.v1", pretrained=True)' in card


def test_a_released_weight_is_never_replaced(
    bundled: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same tag is refused and changes nothing; another tag is added beside it, and is the default only if asked."""
    before, file = bundled.read_text(), bundled.parent / f"{NAME}.v1.safetensors"
    content = file.read_bytes()
    call = [str(run), "--out", str(tmp_path / "again"), "--manifest", str(bundled), *TERMS]
    assert main(call) == 2
    assert "never replaced under its tag" in capsys.readouterr().err
    assert (bundled.read_text(), file.read_bytes()) == (before, content)
    assert main([*call, "--tag", "v2"]) == 0
    assert main([*call, "--tag", "v3", "--default"]) == 0
    assert {row.tag: row.default for row in read_manifest(bundled) if row.name == NAME} == {
        "v1": False,
        "v2": False,
        "v3": True,
    }
    untouched = [row for row in json.loads(bundled.read_text())["rows"] if row["name"] != NAME]
    assert untouched == [row for row in json.loads(before)["rows"] if row["name"] != NAME]


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    with local_hub() as running:
        yield running


PUBLISH_AND_LOAD = """
import json, sys
import deeplabzoo
from deeplabzoo.evaluation.reproduce import golden_difference
from deeplabzoo.cli.publish import main
address, golden, *call = sys.argv[1:]
if status := main(call):
    sys.exit(status)
made, loaded = deeplabzoo.create(address, pretrained=True), deeplabzoo.load(address)
print(json.dumps([made.classes, max(golden_difference(net, golden) for net in (made, loaded))]))
"""


def test_the_hub_gets_a_release_that_loads_from_there(run: Path, people: Path, hub: LocalHub, tmp_path: Path) -> None:
    """By the real client: one commit with model, facts, card and curves, no picture of the data; the row is pinned to it."""
    out, address, golden = tmp_path / "out", "hf-hub:someone/their-deeplab", tmp_path / "out" / f"{NAME}.v1.golden.safetensors"
    call = [str(run), "--data", str(people), "--out", str(out), "--hub", "someone/their-deeplab", *TERMS]
    # a process of its own, since the client reads its settings when it is imported
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_test"}
    command = [sys.executable, "-W", "ignore", "-c", PUBLISH_AND_LOAD, address, str(golden), *call]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings}, check=False)
    assert done.returncode == 0, done.stderr
    classes, difference = json.loads(done.stdout.splitlines()[-1])
    assert classes == ["background", "person"]
    assert difference < 1e-5
    assert hub.repos == {"someone/their-deeplab"}
    ((repo, message, files),) = hub.commits
    assert repo == "someone/their-deeplab"
    assert message.startswith(f"{NAME}.v1: mIoU ")
    reports = {f"{NAME}.v1_folder_{split}.json" for split in ("val-5", "test-3")}
    assert set(files) == {"model.safetensors", "golden.safetensors", "config.json", "README.md", "curves.png", *reports}
    assert files["model.safetensors"] == (out / f"{NAME}.v1.safetensors").read_bytes()
    assert f'deeplabzoo.create("{address}", pretrained=True)' in files["README.md"].decode()
    row = row_in(out)
    assert isinstance(row.source, manifest_module.HubSource)
    assert (row.source.repo, row.source.file) == ("someone/their-deeplab", "model.safetensors")
    assert f"/someone/their-deeplab/resolve/{row.source.revision}/model.safetensors" in hub.files
    assert row.metrics[0].command == f"python -m deeplabzoo.evaluate {address} --data folder --root DIR --split val"


def test_a_hub_that_refuses_is_one_sentence(
    run: Path, hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong token is found out before the work, a failed commit leaves the release that was there."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)  # not in 0.30
    monkeypatch.setenv("HF_TOKEN", "wrong")
    out = tmp_path / "out"
    call = [str(run), "--out", str(out), "--hub", "someone/their-deeplab", *TERMS]
    assert main(call) == 1
    assert "log in with `hf auth login`" in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    assert main(call) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    hub.refuse_commits = True
    assert main([*call, "--tag", "v2"]) == 1
    assert "hf-hub:someone/their-deeplab cannot be published" in capsys.readouterr().err.splitlines()[-1]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_leaves_the_release_that_was_there(
    release: Path, run: Path, people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong in the middle; and no half-made folder stays behind."""
    out = Path(shutil.copytree(release, tmp_path / "out"))
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fail(*words: object, **options: object) -> None:
        raise WeightsError("Something broke.")

    monkeypatch.setattr("deeplabzoo.publish.publish.evaluate_splits", fail)
    assert main([str(run), "--data", str(people), "--out", str(out)]) == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    monkeypatch.undo()
    assert main([str(run), "--out", str(out)]) == 0
    assert json.loads((out / "row.json").read_text())["metrics"] == []


def broken(run: Path, folder: Path, kind: str) -> Path:
    """A copy of a run with something wrong."""
    copied = Path(shutil.copytree(run, folder / kind))
    if kind == "unfinished":
        (copied / "report.json").unlink()
    elif kind == "no run":
        (copied / "recipe.json").unlink()
    elif kind == "no weights":
        (copied / "best.safetensors").unlink()
    elif kind == "taken up again":
        net = deeplabzoo.load(copied / "best.safetensors")
        net.save(copied / "best.safetensors", extra={"step": 99})
    elif kind == "empty report":
        (copied / "report.json").write_text("{}")
    return copied


@pytest.mark.parametrize(
    ("kind", "status", "reason"),
    [
        ("unfinished", 2, "is not finished: it has no report.json; resume it with `python -m deeplabzoo.train folder"),
        ("no run", 2, "it has no recipe.json"),
        ("no weights", 1, "There is no weights file"),
        ("taken up again", 1, "is not the file that report.json measured"),
        ("empty report", 1, "is not the report of a run"),
    ],
)
def test_a_run_that_cannot_be_released_is_one_sentence(
    run: Path, tmp_path: Path, kind: str, status: int, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = broken(run, tmp_path, kind)
    assert main([str(folder)]) == status
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert reason in error
    assert not (folder / "release").exists()


def test_wrong_calls_are_one_sentence(
    run: Path, people: Path, manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before anything is measured or written."""
    other = tmp_path / "other"
    shutil.copytree(people, other)
    for kind in ("images", "masks"):
        (other / "train" / kind / "train0.png").unlink()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    monkeypatch.setenv("DEEPLABZOO_OFFLINE", "1")
    wrong: list[tuple[list[str], int, str]] = [
        ([str(tmp_path / "nowhere")], 2, "There is no run folder"),
        ([str(run), "--data", str(other)], 1, "does not hold the folder images that this run was trained on"),
        ([str(run), "--data", str(tmp_path / "nowhere")], 1, "does not exist"),
        ([str(run), "--tag", "V 1"], 2, "lower-case letters"),
        ([str(run), "--manifest", str(manifest)], 2, "--data-license"),
        ([str(run), "--manifest", str(tmp_path / "m.json"), *TERMS], 2, "There is no manifest"),
        ([str(run), "--manifest", str(manifest), "--name", "my_net", *TERMS], 2, f"these weights are {NAME}, not my_net"),
        ([str(run), "--default"], 2, "it needs --manifest"),
        ([str(run), "--name", "deeplabv3plus_mobilenetv2_person"], 2, "is a released checkpoint of deeplabzoo"),
        ([str(run), "--out", str(run)], 2, "must not be the run's folder"),
        ([str(run), "--out", str(tmp_path / "mine")], 2, "thesis.txt"),
        ([str(run), "--photo", str(run / "recipe.json")], 1, "recipe.json"),
        ([str(run), "--hub", "nobody", *TERMS], 2, "owner/repo"),
        ([str(run), "--hub", "some/one", *TERMS], 1, "DEEPLABZOO_OFFLINE forbids the network"),
        ([], 2, "RUN_DIR"),
    ]
    before = manifest.read_text()
    for call, status, reason in wrong:
        assert main(call) == status, call
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        assert reason in error
    assert manifest.read_text() == before
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"
    assert not (run / "release").exists()


def test_what_is_too_large_is_not_bundled(
    run: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everybody who installs the package carries a bundled file."""
    monkeypatch.setattr("deeplabzoo.publish.publish.MAX_BUNDLED_BYTES", 100_000)
    assert main([str(run), "--out", str(tmp_path / "out"), "--manifest", str(manifest), *TERMS]) == 2
    assert "publish on the Hub with --hub" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_row_that_is_refused_takes_its_files_back(
    run: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing lies beside the manifest that it does not list."""

    def refuse(*words: Any) -> None:
        raise WeightsError("No.")

    monkeypatch.setattr("deeplabzoo.publish.publish.decode_dataclass", refuse)
    before = manifest.read_text()
    assert main([str(run), "--out", str(tmp_path / "out"), "--manifest", str(manifest), *TERMS]) == 1
    assert [path.name for path in manifest.parent.iterdir()] == ["manifest.json"]
    assert manifest.read_text() == before
