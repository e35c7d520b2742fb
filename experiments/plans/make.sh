#!/usr/bin/env bash
# Makes the plans in this directory: models that must fit, and how what 7B exchanges grows from 8 to 256 chips.
#   experiments/plans/make.sh [NAME...]     (all without a name; needs the extra [plan], no TPU)
# What was planned before with the same code is read from the cache. With --quick, memory is a lower bound.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)
wanted=" $* "

plan() { # NAME EXPERIMENT MODEL TOPOLOGY ACTIVATIONS ARGUMENTS...
    local name=$1 experiment=$2 model=$3 topology=$4 activations=$5
    shift 5
    if [ "$wanted" != "  " ] && [[ "$wanted" != *" $name "* ]]; then return; fi
    echo "== $name" >&2
    "$python" -m nlae_jax plan --config "experiments/$experiment.py" --topology "$topology" --json \
        --out "experiments/plans/$name.json" --config.subject.model="experiments/architectures/$model" \
        --config.rl.activations_per_step="$activations" --config.rl.samples_per_activation=8 \
        --config.rl.max_new_tokens=150 --config.attention=pallas "$@" >/dev/null
}

adapters=(--config.lora.rank=64 --config.lora.alpha=64)

plan smollm2-135m_v5e-1x1 smollm2_135m SmolLM2-135M-Instruct v5e:1x1 64 --config.rl.microbatches=16
plan qwen2.5-7b-lora_v5e-2x4 qwen2_5_7b Qwen2.5-7B-Instruct v5e:2x4 64 "${adapters[@]}" \
    --config.rl.microbatches=8 --config.sft.microbatches=8
plan qwen2.5-7b_v5p-2x2x2 qwen2_5_7b Qwen2.5-7B-Instruct v5p:2x2x2 64
plan gemma3-27b_v5p-2x4x4 gemma3_27b gemma-3-27b-it v5p:2x4x4 64
plan llama3.3-70b-lora_v5p-2x2x4 llama3_3_70b Llama-3.3-70B-Instruct v5p:2x2x4 64
plan llama3.3-70b_v5p-4x4x8 llama3_3_70b Llama-3.3-70B-Instruct v5p:4x4x8 64 --config.lora.rank=0 \
    --config.mesh.tensor=2 --config.sft.microbatches=1 --config.rl.microbatches=1
plan llama3.3-70b_v5p-4x4x4 llama3_3_70b Llama-3.3-70B-Instruct v5p:4x4x4 64 --steps rl --config.lora.rank=0 \
    --config.mesh.fsdp=16 --config.mesh.tensor=4 --config.sft.microbatches=1 --config.rl.microbatches=1
plan gemma-4-26b-lora_v5p-2x2x1 gemma4_26b_a4b gemma-4-26B-A4B-it v5p:2x2x1 64 --quick
plan qwen3.6-27b-lora_v5p-2x2x2 qwen3_6_27b Qwen3.6-27B v5p:2x2x2 64 --quick
plan qwen3.6-27b_v5p-2x4x4 qwen3_6_27b Qwen3.6-27B v5p:2x4x4 64 --quick --config.lora.rank=0 \
    --config.mesh.fsdp=16 --config.mesh.tensor=2 --config.rl.microbatches=4 --config.sft.microbatches=4
plan gpt-oss-20b-lora_v5p-2x2x1 gpt_oss_20b gpt-oss-20b v5p:2x2x1 64 --quick \
    --config.rl.microbatches=4 --config.sft.microbatches=4

# Weak scaling: 8 activations a chip, parameters split over 8 chips and copied over the rest.
for slice in 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8; do
    chips=$((${slice//x/*}))
    plan "weak-scaling/qwen2.5-7b_v5p-$slice" qwen2_5_7b Qwen2.5-7B-Instruct "v5p:$slice" $((8 * chips)) --steps rl \
        --config.mesh.data=-1 --config.mesh.fsdp=8 --config.sft.batch_size=$((32 * chips))
done
