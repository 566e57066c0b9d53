"""`python -m deeplabzoo.evaluate`; the command is in deeplabzoo/cli/evaluate.py."""

import sys
from types import ModuleType
from typing import Any

from deeplabzoo.cli.evaluate import main


class _CallableModule(ModuleType):
    """The module, which `import deeplabzoo.evaluate` puts in the place of the function of that name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        from deeplabzoo.evaluation.evaluate import evaluate

        return evaluate(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule  # only a module's class can make it callable

if __name__ == "__main__":
    raise SystemExit(main())
