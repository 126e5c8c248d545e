#!/usr/bin/env bash
# Pretrain on several machines: run the same command on each.
#
#   NODES=4 MASTER=node0 examples/multi_node.sh configs/mixtral-8x7b.yaml [--dry-run] [Megatron's flags ...]
#
# NODES: number of machines. MASTER: address of one of them, the same everywhere. PORT: a free port there (default
# 29500). JOB: a name that no other job there has (default: megatron). GPUS: of each machine (default 8). OUTPUT has to
# lie on a file system that all machines share. The other settings: see launch.sh.
. "$(dirname "$0")/launch.sh"

launch torchrun --nnodes "${NODES:?set NODES to the number of machines}" --nproc-per-node "${GPUS:-8}" \
    --rdzv-backend c10d --rdzv-endpoint "${MASTER:?set MASTER to the address of one machine}:${PORT:-29500}" \
    --rdzv-id "${JOB:-megatron}" -- "$@"
