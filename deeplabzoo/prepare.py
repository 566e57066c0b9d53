"""`python -m deeplabzoo.prepare`; the command is in deeplabzoo/cli/prepare.py."""

from deeplabzoo.cli.prepare import main

if __name__ == "__main__":
    raise SystemExit(main())
