"""A name or a file becomes a network: what was loaded is said, what does not fit is refused, and nothing is loaded in part."""

import pickle
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.local_server import LocalServer, local_server
from helpers.rows import row
from helpers.tensor_work import TensorWork, require_work_of_one_model
from safetensors.torch import save_file

import deeplabzoo
from deeplabzoo.checkpoints.build import adapt_stem
from deeplabzoo.data.classes import class_list
from deeplabzoo.errors import DeepLabZooError, DownloadError, UnknownNameError, UsageError, WeightsError
from deeplabzoo.hub import factory, registry
from deeplabzoo.hub.http_download import sha256_of
from deeplabzoo.hub.manifest import Manifest, UrlSource, WeightRow
from deeplabzoo.models.config import DeepLabConfig, Preprocessing
from deeplabzoo.models.deeplab import DeepLab

IMAGE = torch.rand(1, 3, 65, 65, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def net() -> DeepLab:
    torch.manual_seed(0)
    config = DeepLabConfig(architecture="deeplabv3", encoder="resnet18", num_classes=21, output_stride=16)
    voc = class_list("voc")
    own = Preprocessing(size=(321, 321), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    return DeepLab(config, classes=voc.classes, palette=voc.palette, preprocessing=own).eval()


@pytest.fixture(scope="module")
def file(net: DeepLab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    net.save(path)
    return path


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level("INFO", "deeplabzoo")
    return caplog


def same_tensors(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


# --- names


def test_a_name_alone_is_the_papers_model() -> None:
    plain = deeplabzoo.create("deeplabv3plus_resnet18")
    assert (plain.num_classes, plain.output_stride, plain.config.in_chans) == (21, 16, 3)
    assert plain.classes[:2] == ("class_0", "class_1")
    assert plain.training
    named = deeplabzoo.create("deeplabv3plus_resnet18_cityscapes")
    assert named.classes == class_list("cityscapes").classes
    assert named.palette == class_list("cityscapes").palette


def test_every_option_reaches_the_model() -> None:
    made = deeplabzoo.create(
        "deeplabv3_resnet18_voc",
        num_classes=4,
        in_chans=5,
        output_stride=8,
        atrous_rates=[2, 4],
        multi_grid=(1, 2),
        norm="group",
        dropout=0.3,
        aux_head=True,
    )
    config = made.config
    assert (config.num_classes, config.in_chans, config.output_stride, config.dropout) == (4, 5, 8, 0.3)
    assert (config.atrous_rates, config.multi_grid, config.norm, config.aux_head) == ((2, 4), (1, 2), "group", True)
    assert made.classes == ("class_0", "class_1", "class_2", "class_3")
    assert made.eval()(torch.rand(1, 5, 33, 40)).shape == (1, 4, 33, 40)


def test_an_encoder_without_stride_16_gets_the_nearest_it_has() -> None:
    """Every listed name builds without a stride being given, at one that its encoder was measured to run at."""
    only_32 = [name for name in deeplabzoo.list_encoders(output_stride=32) if not deeplabzoo.supports(name, 16)]
    for encoder in only_32[:1]:
        assert deeplabzoo.create(f"deeplabv3_{encoder}").output_stride == 32


@pytest.mark.parametrize(
    ("call", "error", "reason"),
    [
        ({"name": "deeplabv3_resnet5O"}, UnknownNameError, "Did you mean 'resnet50'"),
        ({"name": "deeplabv3_resnet18_vocc"}, UnknownNameError, "no dataset is called 'vocc'"),
        ({"name": "deeplabv3_resnet18", "output_stride": 4}, UsageError, "8, 16 or 32"),
        ({"name": "deeplabv3_resnet18", "num_classes": 0}, UsageError, "num_classes must be"),
        ({"name": "deeplabv3_resnet18", "in_chans": 0}, UsageError, "in_chans must be"),
        ({"name": "deeplabv3_resnet18", "pretrained": True}, UnknownNameError, "No weights are released"),
        ({"name": "deeplabv3_mobilenetv2_voc", "pretrained": "coraal"}, UnknownNameError, "its tags are coral"),
        ({"name": "deeplabv3_mobilenetv2_voc.x", "pretrained": "coral"}, UsageError, "choose one"),
        ({"name": "deeplabv3_resnet18", "pretrained": "no/such.safetensors"}, WeightsError, "There is no weights file"),
        ({"name": "deeplabv3_resnet18", "pretrained": None}, UsageError, "pretrained must be"),
        ({"name": "hf-hub:a/b", "pretrained": "tag"}, UsageError, "holds its own weights"),
    ],
)
def test_wrong_calls_end_in_a_sentence(call: dict[str, Any], error: type[DeepLabZooError], reason: str) -> None:
    with pytest.raises(error, match=reason) as caught:
        deeplabzoo.create(**call)
    assert "\n" not in str(caught.value)


def test_a_deep_model_without_weights_is_made_quickly() -> None:
    """A 101-layer model is built once, from its name to its last parameter, and no image runs through it."""
    with TensorWork() as work:
        net = deeplabzoo.create("deeplabv3_resnet101")
    require_work_of_one_model(work, net)


# --- files of our own


def test_a_file_of_ours_rebuilds_the_model(net: DeepLab, file: Path, logged: pytest.LogCaptureFixture) -> None:
    """Configuration, tensors, classes, colours and preprocessing all travel in the one file."""
    back = deeplabzoo.load(file)
    assert back.config == net.config
    assert same_tensors(back, net)
    assert (back.classes, back.palette, back.preprocessing) == (net.classes, net.palette, net.preprocessing)
    assert not back.training
    assert torch.equal(back(IMAGE), net(IMAGE))
    (line,) = logged.messages
    assert line.startswith("deeplabv3_resnet18: ")
    assert f"from net.safetensors (sha256 {sha256_of(file)[:12]})" in line


def test_a_model_remembers_its_file_through_saving(file: Path, tmp_path: Path) -> None:
    """An evaluation report can name the weights, and a saved copy says what it was made from."""
    first = deeplabzoo.load(file)
    assert first.weights_source["sha256"] == sha256_of(file)
    assert first.weights_source["source"] == "net.safetensors"
    assert "adapted" not in first.weights_source
    first.save(tmp_path / "copy.safetensors")
    copy = deeplabzoo.load(tmp_path / "copy.safetensors")
    assert copy.weights_source["trained"]["sha256"] == sha256_of(file)


def test_another_number_of_classes_starts_a_new_classifier_and_logs_it(
    net: DeepLab, file: Path, logged: pytest.LogCaptureFixture
) -> None:
    """VainF#81, #105: 21 -> 3 classes was a size mismatch; here everything but the last layer stays."""
    made = deeplabzoo.create("deeplabv3_resnet18", pretrained=file, num_classes=3)
    assert made.num_classes == 3
    assert made.classes == ("class_0", "class_1", "class_2")
    assert same_tensors(made.encoder, net.encoder)
    assert same_tensors(made.head.aspp, net.head.aspp)
    assert made(IMAGE).shape == (1, 3, 65, 65)
    assert "classifier re-initialized: 21 -> 3 classes" in logged.text
    assert len(logged.messages) == 1
    assert made.weights_source["adapted"]


def test_a_new_classifier_has_the_names_of_the_data_that_was_asked_for(file: Path) -> None:
    made = deeplabzoo.create("deeplabv3_resnet18_camvid", pretrained=file, num_classes=11)
    assert made.classes == class_list("camvid").classes
    with pytest.raises(UsageError, match="has 21 classes and deeplabv3_resnet18_camvid has 11; pass num_classes=11"):
        deeplabzoo.create("deeplabv3_resnet18_camvid", pretrained=file)


def test_one_channel_sees_what_three_equal_ones_saw(net: DeepLab, file: Path, logged: pytest.LogCaptureFixture) -> None:
    """The formula of `in_chans=1`: the sum over RGB, so a grey image gives the very logits of its RGB copy."""
    grey = deeplabzoo.create("deeplabv3_resnet18", pretrained=file, in_chans=1)
    one = IMAGE[:, :1]
    torch.testing.assert_close(grey(one), net(one.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)
    assert "stem adapted from 3 to 1 channels" in logged.text


@pytest.mark.parametrize("in_chans", [2, 4, 6])
def test_more_channels_repeat_rgb_and_keep_the_size_of_the_response(in_chans: int) -> None:
    """in_chans=N has a documented formula, timm's: RGB repeated in order, scaled by 3 / N."""
    weight = torch.rand(8, 3, 7, 7)
    adapted = adapt_stem(weight, in_chans)
    for channel in range(in_chans):
        torch.testing.assert_close(adapted[:, channel], weight[:, channel % 3] * 3 / in_chans)


def test_another_output_stride_keeps_every_tensor(net: DeepLab, file: Path, logged: pytest.LogCaptureFixture) -> None:
    dense = deeplabzoo.create("deeplabv3_resnet18", pretrained=file, output_stride=8)
    assert dense.output_stride == 8
    assert same_tensors(dense, net)
    assert "output stride 16 -> 8" in logged.text


def test_an_auxiliary_head_can_be_added_and_dropped(net: DeepLab, file: Path, tmp_path: Path) -> None:
    """vision#1891: keys of the auxiliary head were the usual reason why a file did not load."""
    with_aux = deeplabzoo.create("deeplabv3_resnet18", pretrained=file, aux_head=True)
    assert with_aux.aux_head is not None
    assert same_tensors(with_aux.head, net.head)
    with_aux.save(tmp_path / "aux.safetensors")
    without = deeplabzoo.create("deeplabv3_resnet18", pretrained=tmp_path / "aux.safetensors", aux_head=False)
    assert same_tensors(without, net)


@pytest.mark.parametrize("option", [{"atrous_rates": (3, 6, 9)}, {"norm": "group"}, {"multi_grid": (1, 2)}])
def test_what_the_weights_were_trained_with_is_not_changed_under_them(file: Path, option: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="These weights were trained with"):
        deeplabzoo.create("deeplabv3_resnet18", pretrained=file, **option)


# --- files that do not fit


def test_v3_weights_for_a_v3plus_name_are_named_as_such(file: Path) -> None:
    """VainF#112: the message was hundreds of missing keys."""
    with pytest.raises(WeightsError, match="holds a DeepLabV3 model, deeplabv3plus_resnet18 was asked for") as caught:
        deeplabzoo.create("deeplabv3plus_resnet18", pretrained=file)
    assert "create('deeplabv3_resnet18'" in str(caught.value)


def test_weights_of_another_encoder_are_named_as_such(file: Path) -> None:
    with pytest.raises(WeightsError, match="has the encoder resnet18, deeplabv3_resnet34 was asked for"):
        deeplabzoo.create("deeplabv3_resnet34", pretrained=file)


def test_a_bare_state_dict_loads_under_a_model_name(net: DeepLab, tmp_path: Path) -> None:
    """Tensors without metadata, in safetensors or PyTorch's format, wrapped by a trainer or by DataParallel."""
    state = net.state_dict()
    save_file(state, tmp_path / "bare.safetensors")
    torch.save(state, tmp_path / "bare.pth")
    torch.save({"epoch": 3, "state_dict": {f"module.{name}": one for name, one in state.items()}}, tmp_path / "trainer.pth")
    torch.save(state, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    for name in ("bare.safetensors", "bare.pth", "trainer.pth", "old.bin"):
        assert same_tensors(deeplabzoo.create("deeplabv3_resnet18", pretrained=tmp_path / name), net)
        with pytest.raises(WeightsError, match="not which model they are of"):
            deeplabzoo.load(tmp_path / name)
        with pytest.raises(WeightsError, match="holds a DeepLabV3 model"):
            deeplabzoo.create("deeplabv3plus_resnet18", pretrained=tmp_path / name)


def test_a_bare_state_dict_determines_its_classes_and_heads(tmp_path: Path) -> None:
    other = deeplabzoo.create("deeplabv3plus_resnet18", num_classes=7, aux_head=True, norm="group")
    torch.save(other.state_dict(), tmp_path / "bare.pth")
    back = deeplabzoo.create("deeplabv3plus_resnet18", pretrained=tmp_path / "bare.pth")
    assert back.config == other.config
    assert same_tensors(back, other)


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
@pytest.mark.parametrize("kind", ["own", "bare"])
def test_no_tensor_is_missing_left_over_or_of_another_shape(net: DeepLab, tmp_path: Path, change: str, kind: str) -> None:
    """vision P#3285: random weights were once evaluated in silence. Here the sentence counts and names the tensors."""
    state = dict(net.state_dict())
    if change == "missing":
        del state["head.aspp.project.conv.weight"]
    elif change == "extra":
        state["head.surplus"] = torch.zeros(1)
    else:
        state["head.aspp.project.conv.weight"] = torch.zeros(1, 2, 3, 3)
    path = tmp_path / "wrong.safetensors"
    net.save(tmp_path / "right.safetensors")
    from safetensors import safe_open

    with safe_open(tmp_path / "right.safetensors", framework="pt") as right:
        save_file(state, path, right.metadata() if kind == "own" else None)
    reason = {"missing": "1 tensors are missing", "extra": "1 tensors are left over", "shape": "1 tensors have another shape"}
    with pytest.raises(WeightsError, match=f"wrong.safetensors.*{reason[change]}.*head"):
        deeplabzoo.create("deeplabv3_resnet18", pretrained=path)


class _Bomb:
    """Writes a file when it is unpickled by a careless reader."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("new_format", [True, False])
def test_code_in_a_pickle_is_never_run(tmp_path: Path, new_format: bool) -> None:
    """The file is refused in a sentence, and what it wanted to do has not happened."""
    path, trace = tmp_path / "evil.pth", tmp_path / "trace"
    bomb = {"state_dict": {"head.classifier.weight": torch.zeros(1)}, "epoch": _Bomb(trace)}
    torch.save(bomb, path, _use_new_zipfile_serialization=new_format)
    plain = tmp_path / "plain.pkl"
    plain.write_bytes(pickle.dumps(_Bomb(trace), protocol=2))
    for one in (path, plain):
        for call in (deeplabzoo.load, lambda file: deeplabzoo.create("deeplabv3_resnet18", pretrained=file)):
            with pytest.raises(WeightsError, match=r"never run|not a whole PyTorch file"):
                call(one)
    assert not trace.exists()


def test_files_that_are_no_weights_end_in_a_sentence(net: DeepLab, file: Path, tmp_path: Path) -> None:
    """Empty, truncated, foreign, a folder, or missing: which file, what is wrong, what to do."""
    torch.save(net.state_dict(), tmp_path / "whole.pth")
    whole_pth = (tmp_path / "whole.pth").read_bytes()
    cases = {
        "empty.safetensors": (b"", "is empty"),
        "empty.pth": (b"", "is empty"),
        "half.safetensors": (file.read_bytes()[:-1000], "not a whole safetensors file"),
        "header.safetensors": (file.read_bytes()[:100], "not a whole safetensors file"),
        "half.pth": (whole_pth[: len(whole_pth) // 2], "not a whole PyTorch file"),
        "text.txt": (b"hello, this is not a weights file", "no weights file that deeplabzoo knows"),
        "page.safetensors": (b"<!DOCTYPE html><html></html>", "not a whole safetensors file"),
        "half.tflite": (b"\x1c\x00\x00\x00TFL3" + b"\x00" * 8, "damaged|cannot|expected"),
        "bytes.pth": (pickle.dumps([1, 2, 3]), "holds no state dict|never run|not a whole"),
    }
    for name, (content, reason) in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        for call in (deeplabzoo.load, lambda one: deeplabzoo.create("deeplabv3_resnet18", pretrained=one)):
            with pytest.raises(WeightsError, match=reason) as caught:
                call(path)
            assert "\n" not in str(caught.value)
    with pytest.raises(WeightsError, match="is a folder"):
        deeplabzoo.load(tmp_path)
    with pytest.raises(WeightsError, match="There is no weights file"):
        deeplabzoo.load(tmp_path / "nothing.safetensors")


def test_an_unknown_layout_is_named_by_its_tensors(tmp_path: Path) -> None:
    torch.save({"backbone.conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"unknown layout .backbone.conv1.weight"):
        deeplabzoo.load(tmp_path / "other.pth")


# --- the encoder's own weights


def test_an_encoder_starts_from_a_file(net: DeepLab, file: Path, tmp_path: Path, logged: pytest.LogCaptureFixture) -> None:
    """From a checkpoint of ours, or from a classifier with timm's names: the encoder's tensors and nothing else."""
    import timm

    classifier = timm.create_model("resnet18", pretrained=False)
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    made = deeplabzoo.create("deeplabv3plus_resnet18", encoder_pretrained=file)
    assert same_tensors(made.encoder, net.encoder)
    made = deeplabzoo.create("deeplabv3plus_resnet18", encoder_pretrained=tmp_path / "classifier.pth")
    assert torch.equal(made.encoder.state_dict()["conv1.weight"], classifier.conv1.weight)
    assert "2 tensors unused (fc.weight, fc.bias)" in logged.text
    grey = deeplabzoo.create("deeplabv3plus_resnet18", encoder_pretrained=tmp_path / "classifier.pth", in_chans=1)
    assert torch.equal(grey.encoder.state_dict()["conv1.weight"], adapt_stem(classifier.conv1.weight, 1))
    with pytest.raises(WeightsError, match="holds the encoder resnet18, resnet34 was asked for"):
        deeplabzoo.create("deeplabv3_resnet34", encoder_pretrained=file)
    with pytest.raises(WeightsError, match=r"lacks .* of the .* tensors of encoder resnet34"):
        deeplabzoo.create("deeplabv3_resnet34", encoder_pretrained=tmp_path / "classifier.pth")


def test_timms_flattened_stage_names_are_the_same_tensors(tmp_path: Path) -> None:
    """Its feature extractors write stages_0 for the classifier's stages.0."""
    import timm

    classifier = timm.create_model("convnext_atto", pretrained=False)
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    made = deeplabzoo.create("deeplabv3_convnext_atto", encoder_pretrained=tmp_path / "classifier.pth")
    ours = {name.replace("_", "."): tensor for name, tensor in made.encoder.state_dict().items()}
    theirs = {name.replace("_", "."): tensor for name, tensor in classifier.state_dict().items()}
    assert ours
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_imagenet_weights_respect_offline_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """DEEPLABZOO_OFFLINE holds timm's downloads, too: no address is looked up, and nothing waits for another try."""
    monkeypatch.setenv("DEEPLABZOO_OFFLINE", "1")
    asked: list[object] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **_: asked.append(arguments))
    monkeypatch.setattr(time, "sleep", asked.append)
    with pytest.raises(DownloadError, match="ImageNet weights of 'resnet18'"):
        deeplabzoo.create("deeplabv3_resnet18", encoder_pretrained=True)
    assert asked == []


# --- released weights


@pytest.fixture
def server() -> Iterator[LocalServer]:
    with local_server() as running:
        yield running


@pytest.fixture
def released_row(file: Path, server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> WeightRow:
    """A released row, `deeplabv3_resnet18_voc.test`, whose file a local server has."""
    url = server.serve("/net.safetensors", file.read_bytes())
    config = DeepLabConfig(architecture="deeplabv3", encoder="resnet18")
    made = row(
        name="deeplabv3_resnet18_voc",
        tag="test",
        origin="deeplabzoo",
        source=UrlSource("url", url),
        bytes=file.stat().st_size,
        sha256=sha256_of(file),
        config=config,
    )
    manifest = object.__new__(Manifest)  # not checked: its url is not https
    object.__setattr__(manifest, "rows", (made,))
    monkeypatch.setattr(registry, "released", lambda: manifest)
    for module in (registry, factory):
        monkeypatch.setattr(module, "released_rows", lambda name: (made,) if name == made.name else ())
    monkeypatch.setattr(factory, "released_row_of", lambda sha256: made if sha256 == made.sha256 else None)
    return made


def test_full_weights_need_one_download(
    net: DeepLab, released_row: WeightRow, server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SMP#957: a full checkpoint must never fetch the encoder's ImageNet file as well, not even where it is asked for."""
    import timm

    def no_imagenet(name: str, pretrained: bool = False, **options: Any) -> Any:
        assert not pretrained
        return create_model(name, **options)

    create_model = timm.create_model
    monkeypatch.setattr(timm, "create_model", no_imagenet)
    made = deeplabzoo.create("deeplabv3_resnet18_voc", pretrained=True, encoder_pretrained=True)
    assert same_tensors(made, net)
    assert [request.path for request in server.requests] == ["/net.safetensors"]


@pytest.mark.parametrize(
    ("name", "pretrained"),
    [
        ("deeplabv3_resnet18_voc", True),
        ("deeplabv3_resnet18_voc.test", True),
        ("deeplabv3_resnet18_voc", "test"),
        ("deeplabv3_resnet18_voc", "deeplabv3_resnet18_voc.test"),
    ],
)
def test_name_and_tag_find_the_released_file(
    net: DeepLab, released_row: WeightRow, logged: pytest.LogCaptureFixture, name: str, pretrained: bool | str
) -> None:
    made = deeplabzoo.create(name, pretrained=pretrained)
    assert same_tensors(made, net)
    source = made.weights_source
    assert (source["name"], source["tag"], source["sha256"]) == (released_row.name, "test", released_row.sha256)
    line = logged.messages[-1]
    assert line.startswith("deeplabv3_resnet18_voc.test: ")
    assert f"from {released_row.source} (sha256 {sha256_of_row(released_row)})" in line


def sha256_of_row(one: WeightRow) -> str:
    return str(one.sha256)[:12]


def test_a_released_file_is_identified_by_its_hash_in_any_folder(released_row: WeightRow, file: Path) -> None:
    assert deeplabzoo.load(file).weights_source["tag"] == "test"


def test_a_tag_without_pretrained_is_its_model_untrained(released_row: WeightRow, server: LocalServer) -> None:
    """pretrained=False never downloads; a tag then says which row's network is built."""
    made = deeplabzoo.create("deeplabv3_resnet18_voc.test")
    assert made.config == released_row.config
    assert server.requests == []


# --- the published TensorFlow Lite files


def test_the_coral_row_matches_its_file(shared_data: Path) -> None:
    """Configuration, preprocessing, classes, size and hash of the manifest row equal what the converter reads off the graph."""
    path = shared_data / "tflite" / "deeplabv3_mnv2_pascal_quant.tflite"
    coral = row()
    assert path.stat().st_size == coral.bytes
    assert sha256_of(path) == coral.sha256
    read = factory.open_checkpoint(path)
    assert read.config == coral.config
    assert read.preprocessing == coral.preprocessing
    assert read.classes == class_list(coral.data).classes
    assert read.palette == class_list(coral.data).palette
    assert (read.source["name"], read.source["tag"]) == (coral.name, coral.tag)


def test_the_coral_weights_load_by_name(shared_data: Path, server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """`create("deeplabv3_mobilenetv2_voc", pretrained=True)` downloads one file, converts it and knows its preprocessing."""
    path = shared_data / "tflite" / "deeplabv3_mnv2_pascal_quant.tflite"
    local = row(source=UrlSource("url", server.serve("/coral.tflite", path.read_bytes())))
    monkeypatch.setattr(factory, "find_weights", lambda name, tag=None: local)
    made = deeplabzoo.create("deeplabv3_mobilenetv2_voc", pretrained=True)
    assert len(server.requests) == 1
    assert made.config == local.config
    assert made.preprocessing == local.preprocessing
    assert made.classes[15] == "person"
    assert same_tensors(made, deeplabzoo.load(path))


def test_a_classifier_file_is_for_encoders(shared_data: Path) -> None:
    path = shared_data / "tflite" / "tf2_mobilenet_v2_1.0_224_ptq.tflite"
    made = deeplabzoo.create("deeplabv3plus_mobilenetv2", encoder_pretrained=path)
    assert made.preprocessing.mean == pytest.approx((127 / 255,) * 3)
    with pytest.raises(WeightsError, match=r"without a DeepLab head; use create.*encoder_pretrained"):
        deeplabzoo.create("deeplabv3_mobilenetv2", pretrained=path)
    with pytest.raises(WeightsError, match="without a DeepLab head"):
        deeplabzoo.load(path)
