#!/usr/bin/env bash
# Fine-tune all weights of a Megatron checkpoint on one machine. It need not have been trained with the losses.
#
#   CHECKPOINT=build/vanilla-0.4b DATA_PATH=my_text_document examples/finetune.sh configs/vanilla-0.4b.yaml [--dry-run]
#
# The config has to describe the checkpoint's model. Optimizer, schedule and data start anew. OUTPUT defaults to
# CHECKPOINT with -finetuned; what it holds already goes on. GPUS and the other settings: see single_node.sh, launch.sh.
. "$(dirname "$0")/launch.sh"

: "${CHECKPOINT:?set CHECKPOINT to the folder that holds latest_checkpointed_iteration.txt}"
OUTPUT=${OUTPUT:-${CHECKPOINT%/}-finetuned}
launch torchrun --standalone --local-addr=127.0.0.1 --nproc-per-node "${GPUS:-8}" -- "$@" \
    --pretrained-checkpoint "$CHECKPOINT"
