"""DeepLabV3 and DeepLabV3+ by name: networks, published weights, prediction and evaluation.

Importing this package is light: torch is imported when a network is made, not when names are listed.
"""

import importlib
from typing import TYPE_CHECKING, Any

from deeplabzoo import moved as _moved

if TYPE_CHECKING:
    from deeplabzoo.errors import DeepLabZooError as DeepLabZooError
    from deeplabzoo.evaluation.evaluate import evaluate as evaluate
    from deeplabzoo.hub.factory import create as create
    from deeplabzoo.hub.factory import load as load
    from deeplabzoo.hub.model_info import describe as describe
    from deeplabzoo.hub.registry import list_models as list_models
    from deeplabzoo.hub.registry import list_weights as list_weights
    from deeplabzoo.inference.predictor import Predictor as Predictor
    from deeplabzoo.models.config import DeepLabConfig as DeepLabConfig
    from deeplabzoo.models.config import Preprocessing as Preprocessing
    from deeplabzoo.models.deeplab import DeepLab as DeepLab
    from deeplabzoo.models.encoder_table import list_encoders as list_encoders
    from deeplabzoo.models.encoder_table import supports as supports
    from deeplabzoo.optimization.optimized_model import measure_engines as measure_engines
    from deeplabzoo.optimization.optimized_model import optimize as optimize


__version__ = "0.1.0"

# public name -> module that defines it; resolved on first use
_HOME = {
    "create": "deeplabzoo.hub.factory",
    "load": "deeplabzoo.hub.factory",
    "list_models": "deeplabzoo.hub.registry",
    "list_weights": "deeplabzoo.hub.registry",
    "describe": "deeplabzoo.hub.model_info",
    "list_encoders": "deeplabzoo.models.encoder_table",
    "supports": "deeplabzoo.models.encoder_table",
    "Predictor": "deeplabzoo.inference.predictor",
    "evaluate": "deeplabzoo.evaluation.evaluate",
    "optimize": "deeplabzoo.optimization.optimized_model",
    "measure_engines": "deeplabzoo.optimization.optimized_model",
    "DeepLab": "deeplabzoo.models.deeplab",
    "DeepLabConfig": "deeplabzoo.models.config",
    "Preprocessing": "deeplabzoo.models.config",
    "DeepLabZooError": "deeplabzoo.errors",
}

__all__ = [*sorted(_HOME), "__version__"]


_moved.install()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'deeplabzoo' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
