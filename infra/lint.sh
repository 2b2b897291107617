#!/usr/bin/env bash
# Style, format and types: what CI checks first and what the pre-commit hook runs.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
set -euo pipefail
.venv/bin/ruff check recray policies jobs tests infra/docs
.venv/bin/ruff format --check --quiet recray policies jobs tests infra/docs
.venv/bin/mypy
