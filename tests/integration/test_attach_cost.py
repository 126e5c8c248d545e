"""What attach() looks at, counted: each module and weight a few times, however many layers there are."""

from collections import Counter

import pytest
import torch
from torch import nn

from megatron_moe_spec import SpecConfig

BOTH = SpecConfig(specialization_loss_coeff=1.0, coupling_loss_coeff=1.0, metrics_interval=1)


def _counts(mm, monkeypatch, num_layers, **settings):
    """Modules and weights of a model, and how often attach() visits the former and compares the latter."""
    from megatron_moe_spec import attach

    model = mm.build_model(num_layers=num_layers, **settings)
    found = Counter(modules=len(list(model.modules())), weights=len(list(model.parameters())))
    named_modules, hashed, get_submodule = nn.Module.named_modules, torch.Tensor.__hash__, nn.Module.get_submodule

    def visit(module, *args, **kwargs):
        found["visits"] += 1
        return named_modules(module, *args, **kwargs)

    def compare(weight):
        found["comparisons"] += 1
        return hashed(weight)

    def look_up(module, name):
        found["visits"] += 1
        return get_submodule(module, name)

    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "named_modules", visit)
        patch.setattr(nn.Module, "get_submodule", look_up)
        patch.setattr(torch.Tensor, "__hash__", compare)
        handle = attach(model, BOTH)
    assert len(handle.layers) > num_layers // 2
    handle.detach()
    return found


@pytest.mark.parametrize("grouped", [False, True])
def test_attach_visits_each_module_and_weight_a_few_times(mm, monkeypatch, grouped):
    settings = dict(moe_grouped_gemm=grouped, num_moe_experts=8)
    few, more, many = (_counts(mm, monkeypatch, layers, **settings) for layers in (2, 4, 8))
    for name in few:
        assert many[name] - more[name] == 2 * (more[name] - few[name]), name
    assert many["modules"] <= many["visits"] <= 3 * many["modules"]
    assert many["comparisons"] < many["weights"] / 8
