"""`python -m deeplabzoo.weights`; the command is in deeplabzoo/cli/weights.py."""

from deeplabzoo.cli.weights import main

if __name__ == "__main__":
    raise SystemExit(main())
