#!/usr/bin/env bash
# Trains on a Slurm cluster with GPUs, one process per GPU. Ends in time to save, and puts itself into the queue again.
#   NODES=2 GPUS=8 launch/slurm.sh [--dry-run] experiments/qwen2_5_7b.py /shared/runs/qwen [--config.field=value ...]
# Start it in the checkout, on a file system that all nodes see, with .venv made there (pip install '.[cuda]'). Further
# options of sbatch are in SBATCH_OPTIONS ("--partition=... --time=..."). Inside an allocation it trains there. Export the
# keys that the config needs too: the job gets this environment.
#SBATCH --job-name=nlae
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2 # Slurm runs a copy of this file from elsewhere
[ -f launch/common.sh ] || cd "$(dirname "$0")/.." || exit 2
# shellcheck source-path=SCRIPTDIR source=common.sh
. launch/common.sh
usage="usage: launch/slurm.sh [--dry-run] CONFIG WORKDIR [--config.field=value ...]"
config=${1:?$usage}
workdir=${2:?$usage}
if [ -z "${SLURM_JOB_ID:-}" ]; then
    find_keys "$@"
    read -ra more <<<"${SBATCH_OPTIONS:-}"
    [ ${#keys[@]} -eq 0 ] || more=(--export=ALL "${more[@]}") # the job has the keys from here
    run sbatch "--nodes=${NODES:-1}" "--ntasks-per-node=${GPUS:-1}" "--gpus-per-node=${GPUS:-1}" ${more[@]+"${more[@]}"} \
        launch/slurm.sh "$@"
    exit
fi
shift 2
# A process that loses another ends by itself within a minute; one that is saving is not disturbed.
train() {
    local code=0
    run srun --kill-on-bad-exit=0 --wait=120 "$PWD/.venv/bin/nlae" train --config "$config" --workdir "$workdir" \
        --distributed auto --config.checkpoint.grace_seconds=240 "$@" || code=$?
    if [ "$code" -eq 75 ]; then # the time is over, or another job comes first
        run scontrol requeue "$SLURM_JOB_ID"
        exit 75
    fi
    return "$code"
}
keep_running train "$@"
