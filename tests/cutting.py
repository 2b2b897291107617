"""A nightly run that keeps a copy of its workspace from before each stage, and from its end: `python
tests/cutting.py CUTS OVERRIDE…`.
"""

import shutil
import sys
from pathlib import Path

from recray import pipeline
from recray.config import load_settings, parse_as_of

AS_OF = "2024-04-20"

if __name__ == "__main__":
    cuts, overrides = Path(sys.argv[1]), sys.argv[2:]
    settings = load_settings(None, overrides)

    def keep(message: str, **fields: str) -> None:
        if message.startswith("── "):
            shutil.copytree(settings.root(), cuts / fields["stage"])

    result = pipeline.run("nightly", settings, parse_as_of(AS_OF), keep)
    shutil.copytree(settings.root(), cuts / "end")
    print(result.to_json())
