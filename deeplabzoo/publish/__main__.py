"""`python -m deeplabzoo.publish`; the command is in deeplabzoo/cli/publish.py."""

from deeplabzoo.cli.publish import main

if __name__ == "__main__":
    raise SystemExit(main())
