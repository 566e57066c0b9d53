"""`python -m deeplabzoo.convert`; the command is in deeplabzoo/cli/convert.py."""

from deeplabzoo.cli.convert import main

if __name__ == "__main__":
    raise SystemExit(main())
