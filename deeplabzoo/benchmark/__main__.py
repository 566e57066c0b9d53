"""`python -m deeplabzoo.benchmark`; the command is in deeplabzoo/cli/benchmark.py."""

from deeplabzoo.cli.benchmark import main

if __name__ == "__main__":
    raise SystemExit(main())
