"""What a caller of `create` may ask of a network, and the configuration that follows from a name and these wishes."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from deeplabzoo.data.classes import class_list
from deeplabzoo.errors import UsageError
from deeplabzoo.models.config import DeepLabConfig
from deeplabzoo.models.encoder_table import encoder_facts
from deeplabzoo.zoo.registry import ModelName


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """None leaves a value to the weights, or to the papers where there are none."""

    num_classes: int | None = None
    in_chans: int | None = None
    output_stride: int | None = None
    atrous_rates: Sequence[int] | None = None
    multi_grid: Sequence[int] | None = None
    norm: Literal["batch", "group"] | None = None
    dropout: float | None = None
    aux_head: bool | None = None

    def of_a_new_network(self, name: ModelName) -> DeepLabConfig:
        """Return the configuration of an untrained network: the papers' one, the classes of its data, as wished.

        Without a wish the output stride is 16, as in most of the papers' tables, or the nearest one that the encoder has.
        """
        strides = encoder_facts(name.encoder).strides
        default = 16 if 16 in strides or not strides else min(strides, key=lambda stride: abs(stride - 16))
        config = DeepLabConfig(
            architecture=name.architecture,
            encoder=name.encoder,
            num_classes=class_list(name.data).num_classes if name.data else 21,
            output_stride=default,
        )
        return self.change(config)

    def change(self, config: DeepLabConfig) -> DeepLabConfig:
        """Return `config` with every wish granted."""
        wished = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        given = {name: value for name, value in wished.items() if value is not None}
        return DeepLabConfig.from_dict({**config.to_dict(), **given})

    def refuse_what_weights_fix(self, config: DeepLabConfig) -> None:
        """Raise UsageError if another arithmetic is wished than the one these weights were trained with."""
        for name in ("atrous_rates", "multi_grid", "norm"):
            wished, own = getattr(self, name), getattr(config, name)
            if wished is not None and (wished if name == "norm" else tuple(wished)) != own:
                raise UsageError(
                    f"These weights were trained with {name}={own!r} and mean nothing with {wished!r}; leave {name} out "
                    "(output_stride scales the rates by itself), or create the network without weights."
                )
