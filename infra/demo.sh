#!/usr/bin/env bash
# A night on the data that ships, and three live requests. Arguments go to `recray demo`, for example --keep-serving.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup
exec .venv/bin/recray demo "$@"
