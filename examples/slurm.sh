#!/usr/bin/env bash
# Pretrain under Slurm: one torchrun on each node.
#
#   sbatch --nodes 4 --gpus-per-node 8 examples/slurm.sh configs/mixtral-8x7b.yaml [Megatron's flags ...]
#   examples/slurm.sh configs/mixtral-8x7b.yaml --dry-run
#
# Submit it from the root of the repository: sbatch runs a copy of this file, in the folder that it was submitted from.
#SBATCH --job-name=megatron_moe_spec
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
. "${SLURM_SUBMIT_DIR:-$PWD}/examples/launch.sh"

nodes=${SLURM_JOB_NUM_NODES:-1}
master=localhost
if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    master=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
fi
launch srun --kill-on-bad-exit=1 torchrun --nnodes "$nodes" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-backend c10d --rdzv-endpoint "$master:${PORT:-29500}" --rdzv-id "${SLURM_JOB_ID:-none}" -- "$@"
