"""Everything known about one name, gathered from the encoder table, the class lists and the manifest."""

from dataclasses import dataclass

from deeplabzoo.data.classes import CLASS_LISTS
from deeplabzoo.models.atrous import aspp_rates
from deeplabzoo.models.encoder_table import EncoderFacts, encoder_facts
from deeplabzoo.zoo.manifest import WeightRow, released
from deeplabzoo.zoo.registry import ModelName, find_weights, parse_name


@dataclass(frozen=True)
class Description:
    """What is known about one model name; `print()` shows it as a short page."""

    name: str
    architecture: str
    encoder: EncoderFacts
    output_strides: tuple[int, ...]
    """Strides that the encoder was measured to run at."""
    atrous_rates: dict[int, tuple[int, ...]]
    """Rates of the pyramid at each of those strides, unless the weights say otherwise."""
    data: str | None
    classes: tuple[str, ...]
    """Class names of `data`; empty where the name has none."""
    weights: tuple[WeightRow, ...]

    def __str__(self) -> str:
        strides = [f"{stride} (rates {', '.join(map(str, rates))})" for stride, rates in self.atrous_rates.items()]
        lines = [
            self.name,
            f"  architecture    {self.architecture}",
            f"  encoder         {self.encoder.name}, {self.encoder.params / 1e6:.2f} M parameters, {self.encoder.family}",
            f"  output strides  {'; '.join(strides) or f'none: {self.encoder.refused}'}",
            f"                  {self.encoder.exactness}",
        ]
        if self.data:
            lines.append(f"  classes         {len(self.classes)} of {self.data}: {', '.join(self.classes)}")
        for row in self.weights:
            lines.append(f"  weights         {row}")
            lines += [f"                  {text}" for text in (_licences(row), row.notes) if text]
        if not self.weights:
            lines.append("  weights         none released")
        return "\n".join(lines)


def describe(name: str) -> Description:
    """Return everything known about one model name, or about one of its weights with `name.tag`.

    Raises UnknownNameError on words or tags that do not exist.
    """
    parsed = parse_name(name)
    facts = encoder_facts(parsed.encoder)
    return Description(
        name=str(parsed),
        architecture=parsed.architecture,
        encoder=facts,
        output_strides=facts.strides,
        atrous_rates={stride: aspp_rates(stride) for stride in facts.strides},
        data=parsed.data,
        classes=CLASS_LISTS[parsed.data].classes if parsed.data else (),
        weights=_rows(parsed),
    )


def _rows(name: ModelName) -> tuple[WeightRow, ...]:
    if name.tag:
        return (find_weights(name),)
    return tuple(row for row in released() if row.name == name.untagged)


def _licences(row: WeightRow) -> str:
    return f"code {row.license.code}; weights {row.license.weights}; data {row.license.data}"
