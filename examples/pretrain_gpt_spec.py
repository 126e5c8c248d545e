"""Pretrain a GPT model with the losses and without the launcher: a script of one's own needs one line more.

It takes Megatron's flags and those of this package:

    torchrun --nproc-per-node 8 examples/pretrain_gpt_spec.py --num-layers 12 ... --moe-coupling-loss-coeff 1e-3
"""

from pretrain_gpt import main

from megatron_moe_spec.launch import install

if __name__ == "__main__":
    install()  # The line, with its import: anywhere before Megatron parses its arguments.
    main()
