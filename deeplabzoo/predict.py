"""`python -m deeplabzoo.predict`; the command is in deeplabzoo/cli/predict.py."""

from deeplabzoo.cli.predict import main

if __name__ == "__main__":
    raise SystemExit(main())
