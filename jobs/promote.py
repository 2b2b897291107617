"""Submit: ray job submit -- python -m jobs.promote --config CONFIG [BUNDLE] [--as-of DATE]
[section.field=value …]
"""

import sys

from recray.cli import job_main

if __name__ == "__main__":
    sys.exit(job_main("promote"))
