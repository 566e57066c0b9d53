"""Old import paths that documents have shown: each gives the module at its new path, with a DeprecationWarning.

`MOVED` is the whole list. The hook costs one dictionary look-up for each import inside the package and imports nothing itself.
An old name and its new one are the same module object, so that classes, monkeypatches and pickles of either agree.

A package that exists no more (`deeplabzoo.zoo`) is an empty package as long as `MOVED` lists modules of it. A command module
that has the name of a former package (`deeplabzoo/train.py`) must set `__path__: list[str] = []`: Python refuses to look for
`deeplabzoo.train.recipe` below a module without it.
"""

import importlib
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.abc import Loader
else:
    Loader = object  # importlib.abc takes longer to import than this whole package

MOVED: dict[str, str] = {
    "deeplabzoo.data.base": "deeplabzoo.data.dataset",
    "deeplabzoo.inference.engine": "deeplabzoo.optimization.optimized_model",
    "deeplabzoo.inference.engine_choice": "deeplabzoo.optimization.optimized_model",
    "deeplabzoo.inference.evaluation": "deeplabzoo.evaluation.evaluate",
    "deeplabzoo.inference.labels": "deeplabzoo.processing.postprocessing",
    "deeplabzoo.inference.preprocess": "deeplabzoo.processing.preprocessing",
    "deeplabzoo.inference.report": "deeplabzoo.evaluation.report",
    "deeplabzoo.metrics": "deeplabzoo.evaluation.metrics",
    "deeplabzoo.models.atrous": "deeplabzoo.models.layers",
    "deeplabzoo.train.recipe": "deeplabzoo.training.recipe",
    "deeplabzoo.zoo.description": "deeplabzoo.hub.model_info",
    "deeplabzoo.zoo.factory": "deeplabzoo.hub.factory",
    "deeplabzoo.zoo.manifest": "deeplabzoo.hub.manifest",
    "deeplabzoo.zoo.registry": "deeplabzoo.hub.registry",
}
"""Old dotted name -> new dotted name, modules and packages; modules of a moved package are found below its new name."""


RENAMED: dict[str, dict[str, str]] = {
    "deeplabzoo.data.dataset": {
        "DATA_NAMES": "DATASET_NAMES",
        "SegmentationData": "SegmentationDataset",
        "open_data": "build_dataset",
    },
    "deeplabzoo.processing.postprocessing": {"labels_of": "upsample_argmax"},
    "deeplabzoo.models.layers": {"block_rates": "multi_grid_dilations", "scale_rates": "scale_atrous_rates"},
}
"""New module -> documented old name -> new name; the old name exists once the module is imported by its old path."""


class MovedModules(Loader):
    """Finds and loads modules by their old names: an entry of `sys.meta_path`.

    Args:
        moved: Old dotted module name -> new one.
    """

    def __init__(self, moved: Mapping[str, str]) -> None:
        self._moved = moved

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return a spec for an old name, None for every other one (Python then asks its own finders)."""
        if not name.startswith("deeplabzoo."):
            return None
        new = self._moved.get(name) or self._below_moved_package(name, path)
        if new is not None:
            return ModuleSpec(name, self, loader_state=_Alias(new))
        is_old_package = any(old.startswith(f"{name}.") for old in self._moved)
        if is_old_package and PathFinder.find_spec(name, path) is None:
            return ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Import the module at its new path and return it; None (an empty module) for a package that exists no more."""
        alias = spec.loader_state
        if not isinstance(alias, _Alias):
            return None
        module = importlib.import_module(alias.new)
        for old, new in RENAMED.get(alias.new, {}).items():
            setattr(module, old, getattr(module, new))
        warnings.warn(
            f"The module {spec.name} has moved; import {alias.new} instead.",
            DeprecationWarning,
            stacklevel=2,  # importlib's own frames do not count, so this is the line of the import statement
        )
        alias.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Execute nothing: the module ran when it was imported by its new name.

        Python has just replaced `__spec__` by that of the old name; with the original, `importlib.reload` finds the file.
        """
        alias = module.__spec__.loader_state if module.__spec__ else None
        if isinstance(alias, _Alias):
            module.__spec__ = alias.spec

    @staticmethod
    def _below_moved_package(name: str, path: Sequence[str] | None) -> str | None:
        """Return the new name of a module whose package has moved: Python's finder would load its file a second time."""
        parent, _, last = name.rpartition(".")
        package = sys.modules.get(parent)
        if package is None or package.__name__ == parent or PathFinder.find_spec(name, path) is None:
            return None
        return f"{package.__name__}.{last}"


class _Alias:
    """What a spec of an old name carries: the new name, and the module's own spec while Python replaces it."""

    def __init__(self, new: str) -> None:
        self.new = new
        self.spec: ModuleSpec | None = None


_FINDER = MovedModules(MOVED)


def install() -> None:
    """Put the finder in front of Python's own, once: those would load files of moved packages under their old names."""
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
