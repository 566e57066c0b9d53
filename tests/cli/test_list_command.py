"""`deeplabzoo list` and `deeplabzoo info`: what there is, what it costs and scores, for people and for scripts."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

import deeplabzoo
from deeplabzoo.cli import info
from deeplabzoo.cli.formatting import columns
from deeplabzoo.cli.info import main as info_main
from deeplabzoo.cli.list import main
from deeplabzoo.data.classes import CLASS_LISTS
from deeplabzoo.hub.manifest import released
from deeplabzoo.hub.model_info import Cost, get_cost, list_entries
from deeplabzoo.hub.registry import list_models, list_weights
from deeplabzoo.models.config import ARCHITECTURES
from deeplabzoo.models.encoder_table import encoder_info, list_encoders, short_name, supports
from deeplabzoo.models.names import parse_name
from tools.encoders import count_costs
from tools.encoders.count_costs import count_encoder, count_model, expected_names, read_table


def listed(*words: str, capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    assert main([*words, "--json"]) == 0
    answer: list[dict[str, object]] = json.loads(capsys.readouterr().out)
    return answer


def in_terminal(code: str, columns_: int, **environment: str) -> str:
    """What a program prints where stdout is a terminal of that width."""
    import pty  # Windows has none

    ours, theirs = pty.openpty()
    env = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS")}
    env |= {"COLUMNS": str(columns_), "TERM": "xterm", **environment}
    with subprocess.Popen([sys.executable, "-c", code], stdout=theirs, env=env) as child:
        os.close(theirs)
        text = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # Linux: the other end is closed
                break
            if not piece:
                break
            text += piece
        assert child.wait() == 0
    os.close(ours)
    return text.decode().replace("\r\n", "\n")


def test_every_model_and_released_file_has_its_cost() -> None:
    """A new encoder or row without one: run `python -m tools.encoders.count_costs --missing` and commit the table."""
    assert set(expected_names()) == set(read_table())


def test_costs_are_what_counting_gives_again() -> None:
    """A sample of the committed table, measured; and both ways of counting agree."""
    for encoder in ("resnet18", "lcnet_050"):
        for name, cost in count_encoder(encoder).items():
            assert get_cost(name) == cost
    row = next(row for row in released() if row.full_name == "deeplabv3_mobilenetv2_voc.coral")
    assert get_cost(row.full_name) == count_model(row.config)
    by_parts = count_encoder("resnet18")["deeplabv3plus_resnet18"]
    config = replace(deeplabzoo.DeepLabConfig(architecture="deeplabv3plus", encoder="resnet18"), output_stride=16)
    assert count_model(config) == by_parts


def test_parameters_are_those_of_the_model() -> None:
    net = deeplabzoo.create("deeplabv3plus_lcnet_050")
    cost = get_cost("deeplabv3plus_lcnet_050")
    assert cost is not None
    assert cost.params == sum(parameter.numel() for parameter in net.parameters())


def test_a_convolution_counts_two_operations_for_each_multiplication() -> None:
    """By hand: 1x1 branch, pooled branch and so on are too many; the classifier's share follows from the class count."""
    few, many = (deeplabzoo.DeepLabConfig(architecture="deeplabv3", encoder="lcnet_050", num_classes=n) for n in (1, 2))
    cells = 33 * 33  # 513 pixels at stride 16
    assert count_model(many).flops[16] - count_model(few).flops[16] == 2 * 256 * cells


def test_counting_what_is_missing_keeps_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--missing` counts nothing twice, and drops what no longer exists."""
    known, kept = Cost(1, {16: 2}), {}
    monkeypatch.setattr(count_costs, "list_encoders", lambda: ["lcnet_050", "resnet18"])
    monkeypatch.setattr(count_costs, "released", tuple)
    monkeypatch.setattr(
        count_costs, "read_table", lambda: {"deeplabv3_lcnet_050": known, "deeplabv3plus_lcnet_050": known, "gone": known}
    )
    monkeypatch.setattr(count_costs, "write_table", kept.update)
    assert count_costs.main(["--missing"]) == 0
    assert kept == {
        "deeplabv3_lcnet_050": known,
        "deeplabv3plus_lcnet_050": known,
        **count_encoder("resnet18"),
    }


def test_the_pattern_and_the_stride_choose(capsys: pytest.CaptureFixture[str]) -> None:
    """The same names as list_models, and figures found at that stride alone."""
    lines = listed("deeplabv3plus_*", "--output-stride", "8", capsys=capsys)
    assert [line["name"] for line in lines] == list_models("deeplabv3plus_*", output_stride=8)
    assert all(supports(str(line["encoder"]), 8) and line["output_stride"] == 8 for line in lines)
    strides = {line["miou"]["output_stride"] for line in lines if isinstance(line["miou"], dict)}
    assert strides == {8}


def test_a_metric_at_another_stride_is_not_called_none(capsys: pytest.CaptureFixture[str]) -> None:
    """With a stride asked for, "not measured" would be a lie about a file that was measured at another one."""
    assert main(["deeplabv3plus_mobilenetv2_voc", "--output-stride", "32"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("not measured at stride 32")


def test_data_and_weights_choose(capsys: pytest.CaptureFixture[str]) -> None:
    lines = listed("--weights", "--data", "voc", capsys=capsys)
    assert {line["name"] for line in lines} == {row.full_name for row in list_weights() if row.data == "voc"}
    assert {line["name"] for line in listed("--data", "voc", capsys=capsys)} == {
        row.name for row in list_weights() if row.data == "voc"
    }


@pytest.mark.parametrize(("sort", "field"), [("params", "params"), ("flops", "flops"), ("size", "bytes")])
def test_least_comes_first_and_unknown_last(sort: str, field: str) -> None:
    values = [getattr(line, field) for line in list_entries(weights=True, sort=sort)]  # type: ignore[arg-type]
    known = [value for value in values if value is not None]
    assert known == sorted(known)
    assert values == [*known, *[None] * (len(values) - len(known))]
    assert len(known) > 3


def test_the_best_metric_comes_first_with_its_protocol(capsys: pytest.CaptureFixture[str]) -> None:
    """A name shows the figure of the file that `create` loads for it, at a single scale if there is one."""
    lines = listed("--data", "voc", "--sort", "miou", capsys=capsys)
    figures = [line["miou"] for line in lines if line["miou"]]
    values = [figure["value"] for figure in figures if isinstance(figure, dict)]
    assert values == sorted(values, reverse=True)
    assert all(line["miou"] is None for line in lines[len(values) :])
    for line in lines[: len(values)]:
        loaded = next(row for row in list_weights(str(line["name"])) if row.default)
        own = [metric for metric in loaded.metrics if metric.name == "mIoU"]
        single = [metric for metric in own if len(metric.scales) == 1 and not metric.flip]
        assert isinstance(line["miou"], dict)
        assert line["miou"]["value"] == max(metric.value for metric in single or own)
        assert line["miou"]["protocol"]
    coral = next(line["miou"] for line in lines if line["name"] == "deeplabv3_mobilenetv2_voc")
    assert isinstance(coral, dict)
    assert (
        coral["value"]
        < 75
        < 80
        < max(metric.value for row in list_weights("deeplabv3_mobilenetv2_voc") for metric in row.metrics)
    )


def test_a_pipe_gets_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is cut or coloured where nobody looks, so that grep sees it all."""
    assert main(["--data", "voc", "--weights"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[0] == "name"
    assert len(lines) == len([row for row in released() if row.data == "voc"])
    assert "\033" not in head
    assert not any("…" in line for line in lines)
    assert any(line.endswith("voc val, 173-image subset of 1449, output stride 16, single scale") for line in lines)


LIST = "from deeplabzoo.list import main; main(['--data', 'voc', '--weights'])"


@pytest.mark.posix
def test_a_terminal_gets_lines_of_its_width() -> None:
    """At 120 columns nothing wraps; the name and the numbers stay whole."""
    lines = in_terminal(LIST, 120, NO_COLOR="1").splitlines()
    assert max(map(len, lines)) <= 120
    assert any("…" in line for line in lines)
    names = {line.split()[0] for line in lines[1:]}
    assert names == {row.full_name for row in released() if row.data == "voc"}


@pytest.mark.posix
@pytest.mark.parametrize(("environment", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_the_heading_is_bold_unless_no_color(environment: dict[str, str], coloured: bool) -> None:
    assert ("\033[1m" in in_terminal(LIST, 200, **environment)) == coloured


def test_columns_never_shrink_below_their_headings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deeplabzoo.cli.formatting.terminal_width", lambda: 10)
    text = columns(("name", "a long heading"), [("x" * 30, "y" * 40)], shrinkable=("a long heading",))
    assert text.splitlines()[1] == "x" * 30 + "  " + "y" * 13 + "…"


def test_nothing_that_matches_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    """Status 2 and the nearest name; a script's --json and --names are empty instead."""
    assert main(["deeplabv3_resnet5O"]) == 2
    assert "Did you mean 'deeplabv3_resnet50" in capsys.readouterr().err
    assert main(["resnet50"]) == 2
    assert "'*resnet50*' matches more" in capsys.readouterr().err
    assert listed("nothing*", capsys=capsys) == []
    assert main(["nothing*", "--names"]) == 0
    assert capsys.readouterr().out.strip() == ""


def test_names_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["deeplabv3_resnet5*", "--names"]) == 0
    assert capsys.readouterr().out.splitlines() == list_models("deeplabv3_resnet5*")


def test_listing_needs_no_torch_and_leaves_the_package_as_it_is() -> None:
    """And `deeplabzoo.list_models` stays what it was, although `deeplabzoo.list` is a module."""
    code = (
        "import sys, deeplabzoo.list as command\n"
        "command.main(['--data', 'voc'])\n"
        "import deeplabzoo.info as page\n"
        "page.main(['deeplabv3_mobilenetv2_voc'])\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "assert callable(command.deeplabzoo.list_models) if hasattr(command, 'deeplabzoo') else True\n"
        "import deeplabzoo\n"
        "assert deeplabzoo.list_models('deeplabv3_resnet50') == ['deeplabv3_resnet50']"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_info_shows_all_that_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    """Every figure, address, hash and licence of every file of that name."""
    assert info_main(["deeplabv3_mobilenetv2_voc"]) == 0
    page = capsys.readouterr().out
    together = " ".join(page.split())
    for row in list_weights("deeplabv3_mobilenetv2_voc"):
        for text in (row.full_name, row.sha256 or "", row.license.weights, row.license.data, row.notes, row.verified):
            assert " ".join(str(text).split()) in together
        for metric in row.metrics:
            assert f"{metric.value:.2f} %" in together
            assert metric.command is None or metric.command in together
    assert "2.11 M, of which 1.81 M in the encoder" in together
    assert max(len(line) for line in page.splitlines() if "http" not in line) <= 100


def test_info_of_one_file_and_of_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert info_main(["deeplabv3_mobilenetv2_voc.google"]) == 0
    page = capsys.readouterr().out
    assert ".coral" not in page
    assert info_main(["deeplabv3plus_resnet50"]) == 0
    page = capsys.readouterr().out
    assert "none released" in page
    assert "stride 8        atrous rates 12, 24, 36; 231.9 GFLOPs at 513 x 513" in page
    assert info_main(["deeplabv3_resnet5O"]) == 2
    assert "Did you mean" in capsys.readouterr().err


def test_info_as_json_has_the_manifests_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert info_main(["deeplabv3_mobilenetv2_voc", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["classes"] == list(CLASS_LISTS["voc"].classes)
    assert [row["tag"] for row in about["weights"]] == [row.tag for row in list_weights("deeplabv3_mobilenetv2_voc")]
    assert about["output_strides"] == list(encoder_info("mobilenetv2_100").strides)
    assert about["flops_513"]["16"] == 5481418112


def test_every_name_has_a_page() -> None:
    """No encoder, no row is so odd that its page cannot be written."""
    for name in [f"{one}_{short_name(encoder)}" for one in ARCHITECTURES for encoder in list_encoders()][::40]:
        assert list(info._page(deeplabzoo.describe(name)))
    for row in released():
        assert list(info._page(deeplabzoo.describe(row.full_name)))
        assert str(parse_name(row.full_name)) == row.full_name
