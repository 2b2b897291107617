"""`python -m recray.cli`."""

import sys

from recray.cli import main

sys.exit(main())
