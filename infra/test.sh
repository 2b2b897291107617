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
if ! compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null && ! command -v initdb >/dev/null && [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    # for the tests of a ledger on a real server; where it cannot be had, they are skipped with a reason
    apt-get -qq update && apt-get -qq install -y --no-install-recommends postgresql >/dev/null || true
fi
bash infra/lint.sh
exec .venv/bin/python -m pytest "${marks[@]}" "${rest[@]}"
