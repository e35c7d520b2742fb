#!/usr/bin/env bash
# Trains an experiment on this machine and starts it again if it dies: a run continues where it stopped.
#   launch/local.sh [--dry-run] [-n PROCESSES] experiments/smollm2_135m.py runs/smollm2 [--config.rl.num_steps=500 ...]
# With -n, that many processes share the work; if one ends badly, so do the others, and all are started again.
set -u
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"
processes=1
if [ "${1:-}" = -n ]; then
    processes=${2:-}
    [[ $processes =~ ^[1-9][0-9]*$ ]] || die "-n $processes: should be a number of processes"
    shift 2
fi
usage="usage: launch/local.sh [--dry-run] [-n PROCESSES] CONFIG WORKDIR [--config.field=value ...]"
config=${1:?$usage}
workdir=${2:?$usage}
shift 2
train=("${NLAE:-$root/.venv/bin/nlae}" train --config "$config" --workdir "$workdir" "$@")
started=()

# Tells what still runs to save and to end; what does not within GRACE seconds is killed.
stop_all() {
    local left=$((${GRACE:-60} * 10))
    kill -TERM "${started[@]}" 2>/dev/null
    while kill -0 "${started[@]}" 2>/dev/null && ((left-- > 0)); do sleep 0.1; done
    kill -KILL "${started[@]}" 2>/dev/null
    wait
}

together() {
    local index code=0 port=${PORT:-$((20000 + RANDOM % 20000))}
    started=()
    for ((index = 0; index < processes; index++)); do
        if [ -n "$dry_run" ]; then
            quoted "${train[@]}" --distributed "127.0.0.1:$port,$processes,$index"
        else
            "${train[@]}" --distributed "127.0.0.1:$port,$processes,$index" &
            started+=($!)
        fi
    done
    for index in "${started[@]}"; do
        wait -n || {
            code=$?
            break
        }
    done
    [ "$code" -eq 0 ] || stop_all
    return "$code"
}

if [ "$processes" -eq 1 ]; then
    keep_running run "${train[@]}"
else
    # What a script starts in the background does not hear control-C.
    trap 'stop_all; exit 130' INT
    trap 'stop_all; exit 75' TERM
    keep_running together
fi
