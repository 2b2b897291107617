#!/usr/bin/env bash
# Lint, types and tests. --setup-only: stop after the set-up. --full: the slow tests too. Other arguments go to pytest, which then
# runs alone; without them there are two lanes side by side: the tests that need no Ray, and those that start jobs on one cluster; and
# lint, types, the tests that start clusters, endpoints or servers of their own, then those that run Ray in pytest's process.
marks="not slow"
only_setup=
rest=()
for argument in "$@"; do
    case $argument in
    --setup-only) only_setup=yes ;;
    --full) marks="" ;;
    *) rest+=("$argument") ;;
    esac
done
missing() { # Debian's packages of the servers that tests start and this machine has not
    compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || command -v initdb >/dev/null || echo postgresql
    command -v redis-server >/dev/null || echo redis-server
    command -v chromium >/dev/null || echo chromium
}
install_servers() {
    [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null || return 0
    apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $(missing) >/dev/null
}
servers=
if [[ -z $only_setup && -n $(missing) ]]; then
    install_servers & # while the virtual environment is made
    servers=$!
fi
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup
[[ -z $only_setup ]] || exit 0
[[ -z $servers ]] || wait "$servers" || true
if [[ -n $(missing) ]]; then
    echo "test.sh: not installed, and not to be had here: $(missing | xargs); their tests are $([[ -n ${CI:-} ]] && echo "not to be left out in CI" || echo skipped)" >&2
    [[ -z ${CI:-} ]] || exit 1
fi

if [[ ${#rest[@]} -gt 0 ]]; then
    bash infra/lint.sh
    exec .venv/bin/python -m pytest -m "$marks" "${rest[@]}"
fi

# two lanes on two cores: threads that wait for each other would take turns, and those that spin meanwhile would hold the others up
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 OMP_WAIT_POLICY=passive
export RAY_worker_niceness=0 # Ray's workers come after everybody else by default: beside a busy process they would stand still
tests() { # tests with a marker expression, of some files or all
    .venv/bin/python -m pytest --durations=60 --durations-min=1 -m "$1${marks:+ and $marks}" "${@:2}"
}
no_ray_then_jobs() {
    tests "not ray and not own and not second and not long"
}
clusters_then_ray() {
    local failed=0
    .venv/bin/python tests/forked.py || return 1 # compiles what is imported, once for all processes
    bash infra/lint.sh || failed=1
    tests "(ray or own or second) and not alone and not long" || failed=1
    tests "alone" $(grep -rl --include='test_*.py' 'mark\.alone' tests) || failed=1 # in a process of its own
    return $failed
}
long() {
    tests "long"
}
lanes=(no_ray_then_jobs clusters_then_ray)
[[ -n $marks ]] || lanes+=(long) # for what the others leave idle; more of them would get in each other's way
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
set -m # lanes are process groups, which an interrupt ends as a whole
declare -A process
for lane in "${lanes[@]}"; do
    (code=0; "$lane" || code=$?; echo "$SECONDS" >"$folder/$lane.seconds"; exit $code) >"$folder/$lane" 2>&1 &
    process[$lane]=$!
done
trap 'kill -INT -- "${process[@]/#/-}" 2>/dev/null; wait; exit 130' INT TERM
echo "${#lanes[@]} lanes run side by side; to watch them: tail -f $folder/*"
failed=()
for lane in "${lanes[@]}"; do
    code=0
    wait "${process[$lane]}" || code=$?
    printf '\n════ lane %s, exit code %s, after %s s ════\n' "$lane" "$code" "$(cat "$folder/$lane.seconds" 2>/dev/null || echo "$SECONDS")"
    cat "$folder/$lane"
    [[ $code == 0 ]] || failed+=("$lane")
done
count() { cat "$folder"/* | grep -E '^[0-9]+ (passed|failed|skipped|error).* in [0-9.]+s' | grep -oE "[0-9]+ $1" | awk '{ n += $1 } END { print n + 0 }'; }
printf '\n════ all lanes, %s s ════\n' "$SECONDS"
[[ ${#failed[@]} == 0 ]] || { grep -hE '^(FAILED|ERROR) ' "$folder"/* || true; echo "failed: ${failed[*]}"; }
echo "$(count passed) passed, $(($(count failed) + $(count error))) failed, $(count skipped) skipped"
exit ${#failed[@]}
