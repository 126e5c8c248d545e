#!/usr/bin/env bash
# Pretrain on one machine.
#
#   examples/single_node.sh configs/vanilla-0.4b.yaml [--dry-run] [Megatron's flags ...]
#   GPUS=1 examples/single_node.sh configs/tiny.yaml --cpu
#
# GPUS: processes to start (default 8). The other settings: see launch.sh.
. "$(dirname "$0")/launch.sh"

launch torchrun --standalone --local-addr=127.0.0.1 --nproc-per-node "${GPUS:-8}" -- "$@"
