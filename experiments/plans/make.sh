#!/usr/bin/env bash
# Makes the plans in this directory: every model that should fit, and how collectives of 7B grow from 8 to 256 chips.
# Needs the extra [plan]; an hour and a half on two cores, nothing of what was planned before with the same code.
set -euo pipefail
cd "$(dirname "$0")/../.."

plan() { # EXPERIMENT MODEL TOPOLOGY NAME OVERRIDES...
    local experiment=$1 model=$2 topology=$3 name=$4
    shift 4
    echo "== $name" >&2
    python -m nlae_jax plan --config "experiments/$experiment.py" --topology "$topology" --json \
        --out "experiments/plans/$name.json" --config.subject.model="experiments/architectures/$model" \
        --config.rl.activations_per_step=64 --config.rl.samples_per_activation=8 --config.rl.max_new_tokens=150 \
        "$@" >/dev/null
}

