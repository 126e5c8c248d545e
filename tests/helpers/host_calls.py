"""A program: prints how many Python functions a layer and micro-batch call, without losses and with the main two.

By the models of ``make host-time``; JSON, by layout.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import null_driver

null_driver.install()

import host_model  # noqa: E402
import torch  # noqa: E402

from megatron_moe_spec import SpecConfig, attach  # noqa: E402

LAYERS = 4
BOTH = dict(specialization_loss_coeff=2e-3, coupling_loss_coeff=1e-3, kernels="triton")


def calls(recompute: bool, losses: dict) -> float:
    model = host_model.Layers(LAYERS, 16, 2, recompute)
    handle = attach(model, SpecConfig(**losses)) if losses else None
    x = torch.randn(host_model.TOKENS, 1, host_model.HIDDEN, requires_grad=True)
    for _ in range(3):  # what is compiled, or looked up once
        model(x).sum().backward()
    if handle:
        handle.end_step()
    number = 0

    def count(frame, event, argument):
        nonlocal number
        number += event == "call"

    sys.setprofile(count)
    model(x).sum().backward()
    sys.setprofile(None)
    return number / LAYERS


if __name__ == "__main__":
    host_model.initialize(int(sys.argv[1]))
    host_model.as_on_gpu()
    layouts = {"plain": False, "recompute": True}
    print(json.dumps({name: calls(recompute, BOTH) - calls(recompute, {}) for name, recompute in layouts.items()}))
