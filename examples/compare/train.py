"""A run of an experiment: trains by Megatron's own loop, then judges the model on held-out text."""

import json
import os
from pathlib import Path

import torch
from megatron.core.utils import unwrap_model
from megatron.training import get_args

from examples import pretrain_gpt
from examples.compare import upcycle
from examples.compare.evaluate import evaluate


def add_flags(parser):
    """Adds this script's own flags to Megatron's."""
    group = parser.add_argument_group("experiment")
    group.add_argument("--held-out", type=Path, required=True, help="file of sequences to judge the model on")
    group.add_argument("--results", type=Path, required=True, help="file to write what was found to")
    group.add_argument(
        "--evaluate-experts", type=int, nargs="*", default=[], help="experts a token, fewer than trained"
    )
    group.add_argument("--keep-weights", type=Path, help="file to write the trained weights to")
    group.add_argument("--upcycle", type=Path, help="file of a dense model's weights to start from")
    group.add_argument(
        "--upcycle-noise", type=float, default=0.0, help="on experts, in standard deviations of a weight"
    )
    return parser


def main():
    models = []

    def step(data_iterator, model):
        if not models:
            models.append(model)
            args = get_args()
            if args.upcycle:
                upcycle.start(unwrap_model(model), args.upcycle, args.upcycle_noise, args.seed)
        return pretrain_gpt.forward_step(data_iterator, model)

    pretrain_gpt.train(step, add_flags)
    args = get_args()
    if args.keep_weights:
        torch.save(unwrap_model(models[0]).state_dict(), args.keep_weights)
    found = evaluate(models[0], args.held_out, args.evaluate_experts)
    # Moved into place, so that it is there whole or not at all.
    part = args.results.with_suffix(".part")
    part.write_text(json.dumps(found) + "\n")
    os.replace(part, args.results)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
