"""The wheel that `python -m build` makes works in an empty folder, without the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.second

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the files of the wheel, which comes first on the path of a process."""
    source = tmp_path_factory.mktemp("source")
    for name in ("recray", "policies", "jobs"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(REPOSITORY / name, source)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(source / "dist")],
        cwd=source,
        check=True,
        capture_output=True,
    )
    (wheel,) = (source / "dist").glob("recray-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(source / "site")
    return source / "site"


def run(installed, folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(installed), "HOME": str(folder)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )


def test_every_file_of_the_packages_is_in_it(installed):
    listed = subprocess.run(
        ["git", "ls-files", "recray", "policies", "jobs"], cwd=REPOSITORY, capture_output=True, text=True
    ).stdout.split()
    missing = [name for name in listed if (REPOSITORY / name).exists() and not (installed / name).exists()]
    assert listed and missing == []


def test_its_metadata_name_the_extras(installed):
    (metadata,) = installed.glob("recray-*.dist-info/METADATA")
    extras = [
        line.split()[1] for line in metadata.read_text().splitlines() if line.startswith("Provides-Extra")
    ]
    assert {"serve", "text", "traces", "dev"} <= set(extras)
    assert "recray = recray.cli:main" in metadata.with_name("entry_points.txt").read_text()


def test_commands_run_from_it(installed, tmp_path):
    where = run(installed, tmp_path, "-c", "import recray, jobs, policies; print(recray.__file__)")
    assert where.stdout.startswith(str(installed)), where.stderr
    sample = installed / "recray" / "dataset" / "online_retail"
    done = run(
        installed, tmp_path, "-m", "recray.cli", "init", "shop.yaml", "--template", "shop", "--from-data",
        str(sample / "events.parquet"), str(sample / "items.parquet"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = run(installed, tmp_path, "-m", "jobs.prepare", "--config", "shop.yaml", "data.events=[gone.csv]")
    assert done.returncode == 1 and "gone.csv does not exist" in done.stderr, done.stderr
