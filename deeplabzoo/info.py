"""`python -m deeplabzoo.info`; the command is in deeplabzoo/cli/info.py."""

from deeplabzoo.cli.info import main

if __name__ == "__main__":
    raise SystemExit(main())
