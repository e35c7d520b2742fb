#!/usr/bin/env bash
# Trains an experiment on this machine and starts it again if it dies: a run continues where it stopped.
#   launch/local.sh [--dry-run] [-n PROCESSES] experiments/smollm2_135m.py runs/smollm2 [--config.rl.num_steps=500 ...]
# With -n, that many processes share the work; if one ends badly, so do the others, and all are started again. SIGTERM and
# control-C reach them: they save first. Keys are read from the environment, and a missing one ends it at once.
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

free_port() {
    local port
    while port=$((20000 + RANDOM % 20000)) && (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do :; done
    echo "$port"
}

together() {
    local index code=0 port='' place=()
    [ "$processes" -eq 1 ] || port=${PORT:-$(free_port)}
    started=()
    for ((index = 0; index < processes; index++)); do
        [ -z "$port" ] || place=(--distributed "127.0.0.1:$port,$processes,$index")
        if [ -n "$dry_run" ]; then
            quoted "${train[@]}" ${place[@]+"${place[@]}"}
        else
            "${train[@]}" ${place[@]+"${place[@]}"} &
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

# What a script starts in the background does not hear control-C.
trap 'stop_all; exit 130' INT
trap 'stop_all; exit 75' TERM
keep_running together
