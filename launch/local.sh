#!/usr/bin/env bash
# Trains an experiment on this machine and starts it again if it dies: a run continues where it stopped.
#   launch/local.sh experiments/smollm2_135m.py runs/smollm2 [--config.rl.num_steps=500 ...]
set -u
config=${1:?usage: launch/local.sh CONFIG WORKDIR [--config.field=value ...]}
workdir=${2:?usage: launch/local.sh CONFIG WORKDIR [--config.field=value ...]}
shift 2
nlae=$(dirname "$0")/../.venv/bin/nlae
for attempt in 1 2 3 4 5; do
    "$nlae" train --config "$config" --workdir "$workdir" "$@"
    code=$?
    # 0: done. 2: something only a person can put right. 130: stopped by hand.
    case $code in 0 | 2 | 130) exit $code ;; esac
    echo "launch/local.sh: attempt $attempt ended with code $code; starting again" >&2
    sleep 2
done
exit "$code"
