"""`python -m deeplabzoo.completion`; the command is in deeplabzoo/cli/completion.py."""

from deeplabzoo.cli.completion import main

if __name__ == "__main__":
    raise SystemExit(main())
