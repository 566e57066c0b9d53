"""`python -m deeplabzoo.demo`; the command is in deeplabzoo/cli/demo.py."""

from deeplabzoo.cli.demo import main

if __name__ == "__main__":
    raise SystemExit(main())
