"""`python -m deeplabzoo`: the same as the console script `deeplabzoo`."""

import sys

from deeplabzoo.cli import main

sys.exit(main())
