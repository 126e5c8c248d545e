"""Pretrain a HybridModel with Megatron's own training loop.

A plain Megatron script for megatron-core >= 0.19; the rest of it is pretrain_gpt.py:

    torchrun --nproc-per-node 8 examples/pretrain_hybrid.py --hybrid-layer-pattern 'ME*EME*E' ... --mock-data
"""

import sys

import torch
from megatron.training import argument_utils
from pretrain_gpt import train


def main():
    if not hasattr(argument_utils, "gpt_config_from_args"):
        sys.exit("pretrain_hybrid.py needs megatron-core >= 0.19")
    train(model_config=argument_utils.hybrid_config_from_args)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
