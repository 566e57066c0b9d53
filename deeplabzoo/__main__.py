"""`python -m deeplabzoo`: the same as the console script `deeplabzoo`."""

import sys

from deeplabzoo.cli.main import main

sys.exit(main())
