"""`python -m deeplabzoo.list`; the command is in deeplabzoo/cli/list.py."""

from deeplabzoo.cli.list import main

if __name__ == "__main__":
    raise SystemExit(main())
