"""`python -m deeplabzoo.predict` runs `deeplabzoo.cli.predict`."""

import sys

from deeplabzoo.cli.predict import main

if __name__ == "__main__":
    sys.exit(main())
