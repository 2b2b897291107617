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
# servers that tests start; where one cannot be had, its tests are skipped with a reason
missing=()
compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || command -v initdb >/dev/null || missing+=(postgresql)
command -v redis-server >/dev/null || missing+=(redis-server)
command -v chromium >/dev/null || missing+=(chromium)
if [[ ${#missing[@]} -gt 0 && $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    apt-get -qq update && apt-get -qq install -y --no-install-recommends "${missing[@]}" >/dev/null || true
fi
bash infra/lint.sh
exec .venv/bin/python -m pytest "${marks[@]}" "${rest[@]}"
