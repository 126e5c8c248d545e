"""Models of Megatron's Transformer Engine spec beside those of its local spec, with the same weights."""

import re

import pytest
import torch
from loss_names import BOTH, LOSS_NAMES, coefficients

from megatron_moe_spec import SpecConfig, attach

GROUPED = dict(moe_grouped_gemm=True)
SHARED = dict(moe_shared_expert_intermediate_size=16, moe_shared_expert_gate=True)


def _local_name(name: str) -> str:
    """Of a parameter of the Transformer Engine spec, its name in the local one."""
    name = name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
    name = re.sub(r"mlp\.linear_fc1\.layer_norm_(\w+)", r"pre_mlp_layernorm.\1", name)
    return re.sub(r"experts\.(linear_fc\d)\.(weight|bias)(\d+)", r"experts.local_experts.\3.\1.\2", name)


@pytest.mark.parametrize("names", [[], BOTH, LOSS_NAMES], ids=["none", "both", "all"])
@pytest.mark.parametrize(
    "settings, engine",
    [
        ({}, GROUPED),
        ({}, {}),
        (SHARED, GROUPED),
        (dict(normalization="LayerNorm"), {}),
    ],
    ids=["grouped", "sequential", "shared expert", "LayerNorm"],
)
def test_trains_as_the_local_spec(mm, settings, engine, names):
    local = mm.build_model(transformer_impl="local", **settings)
    model = mm.build_model(**engine, **settings)
    weights = dict(local.named_parameters())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(weights.pop(_local_name(name)))
    assert not weights
    results = []
    for built in (local, model):
        handle = attach(built, SpecConfig(kernels="torch", **coefficients(names, 1.0)))
        gradients = mm.train_step(built, mm.micro_batches(2), main_loss_weight=0.1)
        results.append((gradients, handle.end_step()))
    (expected, expected_values), (found, values) = results
    assert values == pytest.approx(expected_values, rel=1e-5)
    scale = max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in found.items():
        error = float((gradient - expected[_local_name(name)]).norm())
        assert error <= 1e-5 * (float(expected[_local_name(name)].norm()) + 0.1 * scale), name


def test_multi_token_prediction_is_left_alone(mm):
    """What the losses add is what they add by autograd; the prediction's own layers get nothing."""
    from reference import reference_step

    settings, batches = dict(mtp_num_layers=1, num_layers=2, **GROUPED), mm.micro_batches(2)
    config = SpecConfig(kernels="torch", **coefficients(LOSS_NAMES, 1.0))
    expected, _ = reference_step(mm.build_model(**settings), batches, config)
    without, _ = reference_step(mm.build_model(**settings), batches, SpecConfig())
    plain = mm.train_step(mm.build_model(**settings), batches, main_loss_weight=0.1)
    model = mm.build_model(**settings)
    attach(model, config)
    found = mm.train_step(model, batches, main_loss_weight=0.1)
    assert any(name.startswith("mtp") for name in found)
    scale = max(float((expected[name] - without[name]).norm()) for name in expected)
    assert scale > 1e-4
    for name, gradient in found.items():
        added = expected[name] - without[name]
        assert float((gradient - plain[name] - added).norm()) <= 1e-5 * scale, name


@pytest.mark.slow
def test_checkpoints_between_grouped_and_sequential_experts(mm, tmp_path):
    """torch_dist, saved with the losses attached: what is in it is Megatron's alone, and any model loads it."""
    from megatron.core import dist_checkpointing, parallel_state

    groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    config, (batch,) = SpecConfig(**coefficients(LOSS_NAMES, 1.0)), mm.micro_batches(1)
    for grouped in (True, False):
        model = mm.build_model(5, moe_grouped_gemm=grouped)
        keys = sorted(model.sharded_state_dict(metadata=groups))
        attach(model, config)
        state = model.sharded_state_dict(metadata=groups)
        assert sorted(state) == keys
        folder = tmp_path / f"grouped {grouped}"
        folder.mkdir()
        dist_checkpointing.save(state, str(folder))
        expected = mm.run_model(model, batch)
        for attaches in (False, True):
            for other in (True, False):
                loaded = mm.build_model(9, moe_grouped_gemm=other)
                if attaches:
                    attach(loaded, config)
                state = loaded.sharded_state_dict(metadata=groups)
                loaded.load_state_dict(dist_checkpointing.load(state, str(folder)))
                torch.testing.assert_close(mm.run_model(loaded, batch), expected, rtol=1e-5, atol=1e-6)
