"""Recipes of docs/frameworks.md: the order of attaching, adapting and wrapping does not matter."""

import re

import pytest
import torch
from processes import ROOT
from torch import nn

from megatron_moe_spec import SpecConfig

BOTH = SpecConfig(specialization_loss_coeff=1.0, coupling_loss_coeff=1.0)


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter beside it, as Megatron-Bridge's ``LoRALinear``: it calls the layer."""

    def __init__(self, to_wrap: nn.Module, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.to_wrap = to_wrap.requires_grad_(False)
        outputs, inputs = to_wrap.weight.shape
        self.down = nn.Parameter(torch.randn(2, inputs, generator=generator))
        self.up = nn.Parameter(torch.randn(outputs, 2, generator=generator))

    def forward(self, x):
        output, bias = self.to_wrap(x)
        return output + x @ self.down.T @ self.up.T, bias


def _adapt(model, names) -> None:
    seed = 0
    for _, experts in model.named_modules():
        for expert in getattr(experts, "local_experts", ()):
            for name in names:
                setattr(expert, name, Adapted(getattr(expert, name), seed))
                seed += 1


def _replay_routing(monkeypatch) -> None:
    """As frameworks replay the routing of a rollout: the class's method is replaced, and decides for other experts."""
    from megatron.core.transformer.moe.router import TopKRouter

    decide = TopKRouter.routing

    def routing(router, logits, *args, **kwargs):
        _, routing_map = decide(router, logits, *args, **kwargs)
        replayed = routing_map.roll(1, dims=1)
        scores = logits.reshape(-1, logits.shape[-1]).masked_fill(~replayed, float("-inf"))
        return scores.softmax(dim=1), replayed

    monkeypatch.setattr(TopKRouter, "routing", routing)


def test_routing_replay_before_and_after(megatron, monkeypatch):
    import megatron_models

    from megatron_moe_spec import attach

    results = []
    for order in ("plain", "attach, replay", "replay, attach"):
        model = megatron_models.build_model()
        with monkeypatch.context() as patch:
            if order == "replay, attach":
                _replay_routing(patch)
            handle = attach(model, BOTH)
            if order == "attach, replay":
                _replay_routing(patch)
            gradients = megatron_models.train_step(model, megatron_models.micro_batches(2), main_loss_weight=1.0)
        results.append((gradients, handle.end_step()))
    (_, plain), (first, first_values), (last, last_values) = results
    assert first_values == last_values
    assert abs(first_values["coupling_loss"] / plain["coupling_loss"] - 1.0) > 0.01
    assert all(torch.equal(first[name], last[name]) for name in last)


@pytest.mark.parametrize("adapted", [("linear_fc2",), ("linear_fc1", "linear_fc2")])
def test_adapters_before_and_after(megatron, adapted):
    import megatron_models

    from megatron_moe_spec import attach

    results = []
    for order in ("plain", "attach, adapt", "adapt, attach"):
        model = megatron_models.build_model()
        handle = attach(model, BOTH) if order == "attach, adapt" else None
        _adapt(model, adapted)
        if order == "adapt, attach":
            handle = attach(model, BOTH)
        gradients = megatron_models.train_step(model, megatron_models.micro_batches(2), main_loss_weight=1.0)
        results.append((gradients, handle and handle.end_step()))
    (plain, _), (first, first_values), (last, last_values) = results
    assert first_values == last_values and first_values["specialization_loss"] > 0
    assert first.keys() == last.keys()
    for name in first:  # Sums of the same terms in another order.
        torch.testing.assert_close(first[name], last[name], rtol=1e-4, atol=1e-5 * float(last[name].abs().max()))
    routers = [name for name in first if name.endswith("router.weight")]
    experts = [name for name in first if ".linear_fc1." in name]
    assert routers and experts
    for name in (*routers, *experts):
        assert float((first[name] - plain[name]).norm()) > 1e-2 * float(plain[name].norm()), name


def test_hook_before_ddp_gets_a_list_of_chunks(megatron):
    """Megatron-Bridge's hooks take and return the list; Megatron's DDP comes afterwards, in ``train_step``."""
    import megatron_models

    from megatron_moe_spec import attach

    batches = megatron_models.micro_batches(2)
    alone = megatron_models.build_model()
    attach(alone, BOTH)
    listed = megatron_models.build_model()
    attach([listed], BOTH)
    moduled = megatron_models.build_model()
    attach(nn.ModuleList([moduled]), BOTH)  # NeMo's MegatronParallel
    expected = megatron_models.train_step(alone, batches)
    for model in (listed, moduled):
        found = megatron_models.train_step(model, batches)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_recipes_are_valid_python():
    """Their names are those of this package; what the frameworks define is not here to be tried."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "frameworks.md").read_text(), re.S)
    assert len(blocks) == 6
    for block in blocks:
        compile(block, "docs/frameworks.md", "exec")
    scope = {}
    exec(blocks[0], scope)
    assert isinstance(scope["spec"], SpecConfig) and scope["spec"].enabled
