"""`python -m deeplabzoo.train`; the command is in deeplabzoo/cli/train.py."""

from deeplabzoo.cli.train import main

__path__: list[str] = []
"""Lets `deeplabzoo.train.recipe`, an old import path, be looked up below this module (see deeplabzoo.moved)."""

if __name__ == "__main__":
    raise SystemExit(main())
