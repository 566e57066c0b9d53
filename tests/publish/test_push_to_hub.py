"""`net.push_to_hub` and `create("hf-hub:…")`: both ways through the real huggingface_hub client, against a server of ours."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from helpers.local_hub import LocalHub, local_hub
from helpers.local_server import local_server

import deeplabzoo
from deeplabzoo.data.datasets.synthetic_shapes import SyntheticShapes
from deeplabzoo.errors import DownloadError, OutputError, UsageError, WeightsError
from deeplabzoo.hub.manifest import released

REPO = "someone/their-deeplab"
PHOTO = Path(__file__).resolve().parents[2] / "docs" / "images" / "cat.jpg"

READ = """
import json, sys, torch, deeplabzoo
image = torch.linspace(-2, 2, 3 * 65 * 97).reshape(1, 3, 65, 97)
torch.set_num_threads(1)
answers = []
for address in sys.argv[2:]:
    net = deeplabzoo.create(address)
    with torch.no_grad():
        answers.append(net(image))
    loaded = deeplabzoo.load(address)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), loaded.state_dict().values(), strict=True))
torch.save(answers, sys.argv[1])
print(json.dumps([list(net.classes), net.palette, net.preprocessing.to_dict(), net.config.to_dict()]))
"""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    from huggingface_hub import constants

    with local_hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)  # not in 0.30
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield running


def small(seed: int = 0, num_classes: int = 3) -> deeplabzoo.DeepLab:
    torch.manual_seed(seed)
    config = deeplabzoo.DeepLabConfig(
        architecture="deeplabv3plus",
        encoder="lcnet_050",
        num_classes=num_classes,
        head_channels=16,
        decoder_channels=16,
        decoder_low_level_channels=8,
    )
    names = [f"thing {index}" for index in range(num_classes)]
    return deeplabzoo.DeepLab(config, classes=names, palette=[(index, 7, 9) for index in range(num_classes)]).eval()


def logits(net: deeplabzoo.DeepLab) -> torch.Tensor:
    with torch.no_grad():
        return net(torch.linspace(-2, 2, 3 * 65 * 97).reshape(1, 3, 65, 97))


def read_back(hub: LocalHub, home: Path, *addresses: str) -> tuple[list[torch.Tensor], list[object]]:
    """Create the addresses in a fresh process, as somebody else would; returns their logits and what the last one says."""
    out = home / "logits.pt"
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-W", "ignore", "-c", READ, str(out), *addresses]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    facts: list[object] = json.loads(done.stdout.splitlines()[-1])
    return torch.load(out, weights_only=True), facts


def front_matter(card: str) -> dict[str, object]:
    values: dict[str, object] = yaml.safe_load(card.split("---")[1])
    return values


def test_what_is_pushed_comes_back_with_the_same_logits(hub: LocalHub, tmp_path: Path) -> None:
    """Both ways, and each revision by its commit: what was pushed first is still there after a second push."""
    first, second = small(0), small(1)
    one = first.push_to_hub(REPO, token="hf_test", commit_message="First try")
    two = second.push_to_hub(REPO, token="hf_test")
    assert re.fullmatch("[0-9a-f]{40}", one)
    assert [message for _, message, _ in hub.commits] == ["First try", "Weights, config and model card"]
    answers, facts = read_back(hub, tmp_path, f"hf-hub:{REPO}", f"hf-hub:{REPO}@{one}", f"hf-hub:{REPO}@{two}")
    torch.testing.assert_close(answers[0], logits(second), rtol=0, atol=1e-5)
    torch.testing.assert_close(answers[1], logits(first), rtol=0, atol=1e-5)
    assert torch.equal(answers[2], answers[0])
    assert not torch.allclose(answers[1], answers[0])
    own = [list(second.classes), second.palette, second.preprocessing.to_dict(), second.config.to_dict()]
    assert facts == json.loads(json.dumps(own))


def test_the_repository_holds_safetensors_facts_and_a_card(hub: LocalHub) -> None:
    """Nothing is pickled; config.json reads like the network; no figure and no licence is claimed that nobody gave."""
    net = small()
    net.weights_source = {"name": None, "tag": None, "sha256": "0" * 64, "source": "/home/me/secret/run.safetensors"}
    net.push_to_hub(REPO, token="hf_test")
    ((_, _, files),) = hub.commits
    assert set(files) == {"model.safetensors", "config.json", "README.md"}
    facts = json.loads(files["config.json"])
    assert facts["config"]["encoder"] == "lcnet_050"
    assert facts["classes"] == ["thing 0", "thing 1", "thing 2"]
    assert (facts["metrics"], facts["license"]) == ([], None)
    card = files["README.md"].decode()
    said = front_matter(card)
    assert said["library_name"] == "deeplabzoo"
    assert "model-index" not in said
    assert "license" not in said
    assert f'deeplabzoo.create("hf-hub:{REPO}")' in card
    assert "No evaluation results are available." in card
    assert "Training details were not provided." in card
    assert "Not evaluated" in card
    assert not any(b"/home/me" in content for content in files.values())
    assert hub.cards  # the client had the Hub check the card's front matter


def test_measured_metrics_go_into_the_model_index(hub: LocalHub) -> None:
    """A report of these tensors is believed; one of others is refused before anything is sent."""
    net, data = small(num_classes=4), SyntheticShapes("val", (48, 64), 3)
    report = deeplabzoo.evaluate(net, data, progress=False, device="cpu")
    net.push_to_hub(REPO, token="hf_test", reports=[report], license="Apache-2.0", photo=PHOTO)
    ((_, _, files),) = hub.commits
    said = front_matter(files["README.md"].decode())
    assert said["license"] == "apache-2.0"
    (model,) = said["model-index"]  # type: ignore[misc]
    values = {one["name"]: one["value"] for result in model["results"] for one in result["metrics"]}
    expected = {"mIoU (%)": report.miou, "pixel accuracy (%)": report.pixel_accuracy}
    assert values == {name: round(100 * value, 2) for name, value in expected.items()}
    assert said["widget"] == [{"src": f"https://huggingface.co/{REPO}/resolve/main/photo.jpg", "example_title": "photo"}]
    assert {"photo.jpg", "overlay.jpg"} <= set(files)
    other = small(1, num_classes=4)
    asked = len(hub.requests)
    with pytest.raises(UsageError, match="of other tensors than this model's"):
        other.push_to_hub(REPO, token="hf_test", reports=[report])
    assert len(hub.requests) == asked


def test_a_released_file_brings_its_row_until_it_is_changed(hub: LocalHub, capsys: pytest.CaptureFixture[str]) -> None:
    """Figures belong to tensors: after one step of training they are not the network's any more."""
    row = next(row for row in released() if row.source.kind == "bundled" and row.default)
    net = deeplabzoo.create(row.full_name, pretrained=True)
    net.push_to_hub(REPO, token="hf_test")
    with torch.no_grad():
        net.head.classifier.weight += 1
    net.push_to_hub("someone/changed", token="hf_test")
    (_, _, same), (_, _, changed) = hub.commits
    card = same["README.md"].decode()
    measured = [metric for metric in row.metrics if metric.origin == "measured"]
    assert measured
    assert all(f"{metric.value:.2f} %" in card for metric in measured)
    assert row.license.data in card
    assert len(front_matter(card)["model-index"][0]["results"]) >= 1  # type: ignore[index]
    other = changed["README.md"].decode()
    assert "model-index" not in front_matter(other)
    assert f"adapted from `{row.full_name}`" in other
    assert not any(f"{metric.value:.2f} %" in other for metric in measured)
    capsys.readouterr()


def refusal(net: deeplabzoo.DeepLab, kind: type[Exception], **options: object) -> str:
    with pytest.raises(kind) as caught:
        net.push_to_hub(REPO, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_refusals_are_one_sentence(hub: LocalHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No token, a wrong one, no permission, a broken name, an offline switch, no network, weights that are no numbers."""
    from huggingface_hub import constants

    net = small()
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "no valid token was given; log in with `hf auth login`" in refusal(net, OutputError)
    assert "no valid token" in refusal(net, OutputError, token="wrong")
    hub.refuse_commits = True
    assert "the token has no write access" in refusal(net, OutputError, token="hf_test")
    assert not hub.commits
    with pytest.raises(UsageError, match="must read owner/repo"):
        net.push_to_hub("nonsense", token="hf_test")
    with pytest.raises(UsageError, match="is not a valid repository name"):
        net.push_to_hub("some one/--x", token="hf_test")
    monkeypatch.setenv("DEEPLABZOO_OFFLINE", "1")
    assert "DEEPLABZOO_OFFLINE forbids the network" in refusal(net, DownloadError, token="hf_test")
    monkeypatch.delenv("DEEPLABZOO_OFFLINE")
    with local_server() as gone:
        closed = gone.url
    monkeypatch.setattr(constants, "ENDPOINT", closed)
    assert "the Hub cannot be reached" in refusal(net, OutputError, token="hf_test")
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    with torch.no_grad():
        net.head.classifier.bias[0] = float("nan")
    assert "non-finite values" in refusal(net, WeightsError, token="hf_test")
