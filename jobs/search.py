"""Submit: ray job submit -- python -m jobs.search --config CONFIG [--as-of DATE] [search.minutes=60 …]"""

import sys

from recray.cli import job_main

if __name__ == "__main__":
    sys.exit(job_main("search"))
