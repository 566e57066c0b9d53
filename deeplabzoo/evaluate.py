"""`python -m deeplabzoo.evaluate`; the command is in deeplabzoo/cli/evaluate.py."""

from deeplabzoo.cli.evaluate import main

if __name__ == "__main__":
    raise SystemExit(main())
