"""What the two main losses keep from forward to backward, in bytes a token and layer."""

import dataclasses
import gc

import pytest
from processes import needs_megatron

pytest.importorskip("triton", reason="triton is not installed")

import torch

pytestmark = [needs_megatron, pytest.mark.slow]

E, K, F = 128, 8, 40  # experts as Qwen3-30B-A3B has them
OWN = {
    "numbers of rows": 4 * K,
    "inverse lengths": 4 * K,
    "cosines": 4 * K * (K - 1) // 2,
    "which rows are used": K,
    "active experts": E,
    "mass": 4,
}
MEGATRONS = {"logits": 4 * E}


def holders() -> list:
    """Our objects that hold tensors for backward, of whichever model."""
    from megatron_moe_spec.integration.hooks.routing import LayerRouting
    from megatron_moe_spec.integration.taps.base import RouterCall
    from megatron_moe_spec.parallel.token_rows import ComparedRows, KeptRows, LocatedRows, UsedTokens

    gc.collect()
    stages = UsedTokens, LocatedRows, ComparedRows, KeptRows  # of which the last alone is to be there
    return [x for x in gc.get_objects() if isinstance(x, (LayerRouting, RouterCall, *stages))]


def held_bytes(found: list) -> tuple[float, float]:
    """Held by these objects alone, and of Megatron's tensors."""
    tensors = []
    for holder in found:
        for value in (getattr(holder, field.name, None) for field in dataclasses.fields(holder)):
            tensors += [x for x in (value if isinstance(value, list) else [value]) if isinstance(x, torch.Tensor)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    theirs = {x.data_ptr(): x.nbytes for x in tensors if x.shape[-1] in (F, E) and x.is_floating_point()}
    return sum(storages.values()) - sum(theirs.values()), sum(theirs.values())


@pytest.mark.parametrize("fused_swiglu", [True, False])
def test_bytes_a_token_and_layer(mm, fused_swiglu):
    from megatron_moe_spec import SpecConfig, attach

    layers = 3
    model = mm.build_model(
        num_layers=layers,
        num_moe_experts=E,
        moe_router_topk=K,
        moe_ffn_hidden_size=F,
        moe_grouped_gemm=True,
        bias_activation_fusion=fused_swiglu,
    )
    handle = attach(model, SpecConfig(specialization_loss_coeff=2e-3, coupling_loss_coeff=1e-3, kernels="triton"))
    (batch,) = mm.micro_batches(1)
    num_tokens = batch["tokens"].numel()
    earlier = mm.run_model(model, batch)
    of_others = holders()  # of another forward pass that waits for its backward, and of tests before this one
    assert len(of_others) >= 3 * layers
    output = mm.run_model(model, batch)
    found = [x for x in holders() if not any(x is other for other in of_others)]
    assert len(found) == 3 * layers
    own, theirs = (number / num_tokens / layers for number in held_bytes(found))
    # A term of a loss's sum for every other token at most, until the step ends.
    assert sum(OWN.values()) <= own <= sum(OWN.values()) + 4, own
    # Rows are saved for backward as the linear layer saves them, or not needed: none of our objects holds them.
    assert theirs == MEGATRONS["logits"]
    del found
    output.sum().backward()
    assert len(holders()) <= len(of_others)
    del earlier
    handle.detach()
