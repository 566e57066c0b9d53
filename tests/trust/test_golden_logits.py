"""What networks answer stays what it was, from the oldest supported torch and timm to the newest."""

import dataclasses
import hashlib
import json
import math
import time

import pytest
from golden_logits import (
    FLOAT32_TOLERANCE,
    FLOAT64_TOLERANCE,
    GOLDEN,
    Kind,
    answer,
    difference,
    in_numbers,
    kinds,
    read_golden,
    seeded,
    spread,
)
from oldest import installed_versions, is_oldest, oldest_versions
from trust_record import FOLDER, TrustRecord, write_record

from deeplabzoo.errors import UsageError
from deeplabzoo.models.config import DeepLabConfig

KINDS = kinds()


def group(kind: Kind) -> str:
    """What CI takes one kind of: each checkpoint and encoder family, each architecture's heads, each origin's layouts."""
    what, name = kind.name.split("/")[:2]
    return f"{what}/{name.partition('_')[0] if what == 'head' else name}"


CI = list({group(kind): kind for kind in reversed(KINDS) if kind.light}.values())


def differences(kind: Kind) -> tuple[float, float]:
    """How far the network is from its golden answer in float64 and in float32; infinitely if it answers with flat logits."""
    golden, net = read_golden()[kind.name], kind.build()
    in_float32 = difference(in_numbers(answer(net)), golden)
    exact = answer(net.double())
    return (difference(in_numbers(exact), golden) if spread(exact) > 0.01 else math.inf), in_float32


@pytest.mark.parametrize("kind", CI, ids=str)
def test_models_give_their_golden_logits(kind: Kind) -> None:
    """A changed epsilon, rate, padding or layer order in torch, timm or here moves logits far more than rounding does."""
    in_float64, in_float32 = differences(kind)
    assert in_float64 <= FLOAT64_TOLERANCE
    assert in_float32 <= FLOAT32_TOLERANCE


def test_every_kind_has_its_golden_answer() -> None:
    """A family, head or layout that is added without one, or one that is gone, is named here."""
    assert set(read_golden()) == {kind.name for kind in KINDS}
    assert len(KINDS) == len(read_golden())


@pytest.mark.parametrize(
    "change",
    [
        {"norm_eps": 1.01e-5},
        {"align_corners": True},
        {"atrous_rates": (6, 12, 19)},
        {"pooling_first": True},
        {"encoder_norm_eps": 1.01e-5},
        {"encoder_padding": "same"},
    ],
    ids=str,
)
def test_small_changes_of_a_model_are_seen(change: dict[str, object]) -> None:
    """One per cent of an epsilon, one tap of one rate: a golden answer that could not fail would prove nothing."""
    plain = DeepLabConfig(architecture="deeplabv3", encoder="lcnet_050", num_classes=5, head_channels=32)
    changed = seeded(dataclasses.replace(plain, **change)).double()
    assert difference(in_numbers(answer(changed)), read_golden()["head/v3"]) > 10 * FLOAT64_TOLERANCE


@pytest.mark.parametrize("end", ["oldest", "newest"])
def test_both_ends_of_the_supported_versions_gave_these_answers(end: str) -> None:
    """The committed answers were found by the lower bounds of pyproject.toml, all of them, and by versions above."""
    record = json.loads((FOLDER / f"golden_{end}.json").read_text(encoding="utf-8"))
    details = record["details"]
    assert details["golden_sha256"] == hashlib.sha256(GOLDEN.read_bytes()).hexdigest()
    assert record["inputs"] == record["survived"] == len(KINDS) - len(details["refused"])
    assert end == "oldest" or not details["refused"]
    assert set(details["installed"]) == set(oldest_versions())
    at_the_bound = [is_oldest(name, version) for name, version in details["installed"].items()]
    assert all(at_the_bound) if end == "oldest" else not any(at_the_bound)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_every_kind_answers_as_it_always_did() -> None:
    """All kinds, the large ones and every head too, with whatever versions are installed; both ends are recorded.

    An encoder that the oldest timm has not, or cannot run at this stride, is refused in a sentence, which is recorded.
    """
    started = time.perf_counter()
    found: dict[str, tuple[float, float]] = {}
    refused: dict[str, str] = {}
    for kind in KINDS:
        try:
            found[kind.name] = differences(kind)
        except UsageError as error:
            refused[kind.name] = str(error)
    kept = [name for name, (exact, rounded) in found.items() if exact <= FLOAT64_TOLERANCE and rounded <= FLOAT32_TOLERANCE]
    installed = installed_versions()
    oldest = all(is_oldest(name, version) for name, version in installed.items())
    write_record(
        TrustRecord(
            name=f"golden_{'oldest' if oldest else 'newest'}",
            area="numbers",
            what=f"Logits of every kind of network against the golden ones, on the {'oldest' if oldest else 'newest'} "
            "supported torch and timm",
            command="python -m pytest -m soak tests/trust/test_golden_logits.py",
            seconds=round(time.perf_counter() - started, 1),
            inputs=len(found),
            survived=len(kept),
            details={
                "golden_sha256": hashlib.sha256(GOLDEN.read_bytes()).hexdigest(),
                "installed": installed,
                "refused": refused,
                "float64_tolerance_of_largest_logit": FLOAT64_TOLERANCE,
                "float64_largest_difference": float(f"{max(exact for exact, _ in found.values()):.2g}"),
                "float32_tolerance_of_largest_logit": FLOAT32_TOLERANCE,
                "float32_largest_difference": float(f"{max(rounded for _, rounded in found.values()):.2g}"),
            },
        )
    )
    assert {name: found[name] for name in found if name not in kept} == {}
    assert oldest or not refused
