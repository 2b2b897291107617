#!/usr/bin/env bash
# Lint, types and tests. --setup-only: stop after the set-up. --full: the slow tests too. Other arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup
marks=(-m "not slow")
rest=()
for argument in "$@"; do
    case $argument in
    --setup-only) exit 0 ;;
    --full) marks=() ;;
    *) rest+=("$argument") ;;
    esac
done
bash infra/lint.sh
exec .venv/bin/python -m pytest "${marks[@]}" "${rest[@]}"
