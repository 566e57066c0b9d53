"""`python -m deeplabzoo.export`; the command is in deeplabzoo/cli/export.py."""

from deeplabzoo.cli.export import main

if __name__ == "__main__":
    raise SystemExit(main())
