#!/usr/bin/env bash
# A nightly run on the sample data, and three live requests. Arguments go to `recray demo`, for example --keep-serving.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup
exec .venv/bin/recray demo "$@"
