"""HybridModel, which Megatron announces as the successor of GPTModel, trains with the losses as GPTModel does."""

import re

import pytest
import torch
from loss_names import LOSS_NAMES
from processes import HAS_TRANSFORMER_ENGINE, needs_hybrid_model, needs_training_loop
from rule_texts import message_of
from test_pretrain import LOSSES, MEASURE, TRACE, launch, scalars

from megatron_moe_spec import SpecConfig, attach
from megatron_moe_spec.integration.support.checks import check_chunks
from megatron_moe_spec.traces.files import read_trace

pytestmark = needs_hybrid_model

SPECIALIZATION = SpecConfig(specialization_loss_coeff=1.0)

FULL_RECOMPUTE = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
MOE_RECOMPUTE = dict(recompute_granularity="selective", recompute_modules=["moe"])


def _key(name: str) -> str:
    """Name of a GPTModel's parameter in the HybridModel that has an attention layer and an MoE layer for each."""
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        is_attention = parts[3] in ("input_layernorm", "self_attention")
        parts[2] = str(2 * int(parts[2]) + (not is_attention))
    return ".".join(parts).replace("decoder.final_layernorm", "decoder.final_norm")


def _run(mm, model, config) -> tuple:
    """Output before attach() and after it, gradients of the main loss and the losses, logged values."""
    batches = mm.micro_batches(3)
    outputs = [mm.run_model(model, batches[0]).detach()]
    handle = attach(model, config)
    outputs.append(mm.run_model(model, batches[0]).detach())
    gradients = mm.train_step(model, batches, main_loss_weight=0.1)
    return outputs, gradients, handle.end_step()


@pytest.mark.parametrize("kind", ["mass", "pathway"])
@pytest.mark.parametrize(
    "settings",
    [{}, dict(moe_shared_expert_intermediate_size=16), MOE_RECOMPUTE, FULL_RECOMPUTE],
    ids=["plain", "shared expert", "moe recompute", "full recompute"],
)
def test_equals_gpt_model_of_the_same_weights_to_the_last_bit(mm, settings, kind):
    import hybrid_models

    # Megatron's own specification of hybrid models has grouped experts.
    settings = dict(moe_grouped_gemm=HAS_TRANSFORMER_ENGINE, **settings)
    gpt, hybrid = mm.build_model(**settings), hybrid_models.build_model("*E*E*E", **settings)
    weights = dict(hybrid.named_parameters())
    assert weights.keys() == {_key(name) for name, _ in gpt.named_parameters()}
    with torch.no_grad():
        for name, weight in gpt.named_parameters():
            weights[_key(name)].copy_(weight)
    coefficients = {f"{name}_coeff": 0.1 for name in LOSS_NAMES}
    config = SpecConfig(coupling_type=kind, metrics_interval=1, **coefficients)
    plain = mm.train_step(gpt, mm.micro_batches(3), main_loss_weight=0.1)
    expected_outputs, expected, expected_values = _run(mm, gpt, config)
    outputs, gradients, values = _run(mm, hybrid, config)
    assert all(torch.equal(output, expected_outputs[0]) for output in (*outputs, *expected_outputs))
    assert {name for name, gradient in expected.items() if not torch.equal(gradients[_key(name)], gradient)} == set()
    assert gradients.keys() == {_key(name) for name in expected}
    assert not torch.equal(plain["decoder.layers.0.mlp.router.weight"], expected["decoder.layers.0.mlp.router.weight"])
    # HybridModel numbers attention layers, too.
    numbers = [[layer.pop("layer_index") for layer in v["diagnostics"]["layers"]] for v in (expected_values, values)]
    assert numbers == [[0, 1, 2], [1, 3, 5]]
    assert values == expected_values and values.keys() == {*LOSS_NAMES, "diagnostics"}


@pytest.mark.parametrize("pattern, remedy", [("*-M", "*-ME"), ("*-/*E", "*E/*E")])
def test_pattern_without_moe_layers_is_refused(mm, pattern, remedy):
    """MTP layers take no part."""
    import hybrid_models

    message = "--hybrid-layer-pattern has no MoE layer .E. in its main part, before the first / .add an E there"
    with pytest.raises(ValueError, match=message):
        attach(hybrid_models.build_model(pattern), SPECIALIZATION)
    assert len(attach(hybrid_models.build_model(remedy), SPECIALIZATION).layers) == 1


def test_virtual_stages_given_one_by_one_are_refused_by_what_makes_them(mm):
    import hybrid_models

    for model, expected, other in (
        (hybrid_models.build_model("*E*E"), "--hybrid-layer-pattern", "--num-layers-per-virtual-pipeline-stage"),
        (mm.build_model(), "--num-layers-per-virtual-pipeline-stage", "--hybrid-layer-pattern"),
    ):
        model.config.pipeline_model_parallel_size = model.config.virtual_pipeline_model_parallel_size = 2
        with pytest.raises(ValueError, match=message_of("some of a rank's model chunks")) as refused:
            attach(model, SPECIALIZATION)
        assert re.search(f"got 1 of 2.*{expected}", str(refused.value)) and other not in str(refused.value)
        check_chunks([model, model], model.config)


@needs_training_loop
@pytest.mark.slow
def test_a_script_for_hybrid_models_is_launched(tmp_path):
    from megatron.training import argument_utils

    if not hasattr(argument_utils, "gpt_config_from_args"):
        pytest.skip("examples/pretrain_hybrid.py needs megatron-core >= 0.19")
    flags = ["--train-iters", 2, "--hybrid-layer-pattern", "*E|ME/*E", "--spec", "hybrid_models", "stack_spec"]
    flags += ["--pipeline-model-parallel-size", 2, "--tensorboard-dir", tmp_path, *MEASURE, *TRACE, tmp_path / "traces"]
    launch(*flags, *LOSSES, processes=2, script="pretrain_hybrid.py")
    logged = scalars(tmp_path)
    assert list(logged["lm loss"]) == list(logged["specialization_loss"]) == list(logged["coupling_loss"]) == [1, 2]
    trace = read_trace(tmp_path / "traces")
    assert (trace.layers, trace.num_layers, trace.num_experts) == ((1, 3), 4, 4)
