"""Bad use is refused at once, by an error that names the flag and the remedy."""

import argparse
import sys
import types

import pytest

from megatron_moe_spec import SpecConfig
from megatron_moe_spec.arguments import add_moe_spec_args, spec_config_from_args

SPECIALIZATION = SpecConfig(specialization_loss_coeff=1.0)
COUPLING = SpecConfig(coupling_loss_coeff=1.0)


@pytest.mark.parametrize(
    "field, value, flag",
    [
        ("specialization_loss_coeff", -1e-3, "--moe-specialization-loss-coeff"),
        ("coupling_loss_coeff", float("nan"), "--moe-coupling-loss-coeff"),
        ("coupling_loss_coeff", "1e-3", "--moe-coupling-loss-coeff"),
        ("coupling_loss_coeff", True, "--moe-coupling-loss-coeff"),
        ("coupling_type", "joint", "--moe-coupling-type"),
        ("specialization_token_stride", 0, "--moe-specialization-token-stride"),
        ("specialization_token_stride", 1.5, "--moe-specialization-token-stride"),
        ("coupling_across_stages", "maybe", "--moe-coupling-across-stages"),
        ("kernels", "cuda", "--moe-spec-kernels"),
        ("metrics_interval", -1, "--moe-spec-metrics-interval"),
    ],
)
def test_config_names_the_field_and_the_flag(field, value, flag):
    with pytest.raises(ValueError) as error:
        SpecConfig(**{field: value})
    assert field in str(error.value) and flag in str(error.value)


def test_flags_become_the_config():
    parser = add_moe_spec_args(argparse.ArgumentParser())
    args = parser.parse_args(
        "--moe-specialization-loss-coeff 2e-3 --moe-specialization-token-stride 4 --moe-coupling-loss-coeff 1e-3 "
        "--moe-coupling-type pathway --moe-coupling-across-stages drop --moe-spec-kernels torch "
        "--moe-spec-metrics-interval 10".split()
    )
    assert spec_config_from_args(args) == SpecConfig(
        specialization_loss_coeff=2e-3,
        specialization_token_stride=4,
        coupling_loss_coeff=1e-3,
        coupling_type="pathway",
        coupling_across_stages="drop",
        kernels="torch",
        metrics_interval=10,
    )
    assert spec_config_from_args(parser.parse_args([])) == SpecConfig()
    assert spec_config_from_args(argparse.Namespace()) == SpecConfig()


def test_parser_refuses_an_unknown_coupling_type(capsys):
    with pytest.raises(SystemExit):
        add_moe_spec_args(argparse.ArgumentParser()).parse_args(["--moe-coupling-type", "joint"])
    assert "--moe-coupling-type" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings, config, flag",
    [
        (dict(moe_router_topk=1, moe_router_pre_softmax=True), SPECIALIZATION, "--moe-router-topk"),
        (dict(num_layers=1), COUPLING, "--moe-coupling-loss-coeff"),
        (dict(moe_layer_freq=[0, 0, 1]), COUPLING, "--moe-coupling-loss-coeff"),
        (dict(moe_router_dtype="fp64"), SpecConfig(coupling_loss_coeff=1.0, kernels="triton"), "--moe-router-dtype"),
    ],
)
def test_model_that_does_not_fit_is_refused(megatron, settings, config, flag):
    import megatron_models

    from megatron_moe_spec import attach

    with pytest.raises(ValueError, match=flag):
        attach(megatron_models.build_model(**settings), config)


@pytest.mark.parametrize(
    "field, value, flag",
    [
        ("use_transformer_engine_op_fuser", True, "--use-transformer-engine-op-fuser"),
        ("cuda_graph_impl", "transformer_engine", "--cuda-graph-impl"),
        ("enable_cuda_graph", True, "--cuda-graph-impl"),
        ("moe_token_dispatcher_type", "flex", "--moe-token-dispatcher-type"),
        ("transformer_impl", "inference_optimized", "--transformer-impl"),
        ("fp8", "hybrid", "--fp8-format"),
        ("expert_tensor_parallel_size", 2, "--expert-tensor-parallel-size"),
    ],
)
def test_unsupported_setting_is_refused(megatron, field, value, flag):
    """Set on a model that exists: Megatron itself builds some of these only on a GPU."""
    import megatron_models

    from megatron_moe_spec import attach

    model = megatron_models.build_model()
    setattr(model.config, field, value)
    with pytest.raises(ValueError, match=flag):
        attach(model, SPECIALIZATION)


def test_kernels_that_cannot_run_are_refused(megatron, monkeypatch):
    import megatron_models

    from megatron_moe_spec import attach

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="NVIDIA GPU.*--moe-spec-kernels"):
        attach(megatron_models.build_model(), SpecConfig(specialization_loss_coeff=1.0, kernels="triton"))


def test_cuda_graphs_of_attention_alone_are_allowed(megatron):
    import megatron_models

    from megatron_moe_spec import attach

    model = megatron_models.build_model()
    model.config.cuda_graph_impl = "transformer_engine"
    name = "cuda_graph_modules" if hasattr(model.config, "cuda_graph_modules") else "cuda_graph_scope"
    setattr(model.config, name, ["attn"])
    attach(model, SPECIALIZATION)
    for scope in (["attn", "moe_router"], ["moe"], [], "full"):
        model = megatron_models.build_model()
        model.config.cuda_graph_impl = "transformer_engine"
        setattr(model.config, name, scope)
        with pytest.raises(ValueError, match="--cuda-graph-impl"):
            attach(model, SPECIALIZATION)


def test_legacy_grouped_gemm_is_refused(megatron):
    """Its experts are two bare weights: there is no down-projection module to tap."""
    import megatron_models
    import torch

    from megatron_moe_spec import attach

    model = megatron_models.build_model()
    for layer in model.decoder.layers:
        layer.mlp.experts = torch.nn.Module()
    with pytest.raises(ValueError, match="--moe-use-legacy-grouped-gemm"):
        attach(model, SPECIALIZATION)
    attach(model, COUPLING)


def test_model_without_moe_layers_is_refused(megatron):
    import torch

    from megatron_moe_spec import attach

    with pytest.raises(ValueError, match="--num-experts"):
        attach(torch.nn.Linear(2, 2), SPECIALIZATION)


def test_every_problem_is_listed_at_once(megatron):
    import megatron_models

    from megatron_moe_spec import attach

    model = megatron_models.build_model(num_layers=1, moe_router_topk=1, moe_router_pre_softmax=True)
    both = SpecConfig(specialization_loss_coeff=1.0, coupling_loss_coeff=1.0)
    with pytest.raises(ValueError, match="--moe-router-topk.*--moe-coupling-loss-coeff"):
        attach(model, both)


def test_attach_twice_is_refused(megatron):
    import megatron_models

    from megatron_moe_spec import attach

    model = megatron_models.build_model()
    attach(model, SPECIALIZATION)
    with pytest.raises(RuntimeError, match="detach"):
        attach(model, COUPLING)


def test_missing_megatron_is_named(monkeypatch):
    import torch

    from megatron_moe_spec import attach

    monkeypatch.setitem(sys.modules, "megatron.core", None)
    with pytest.raises(ImportError, match="pip install 'megatron-core"):
        attach(torch.nn.Linear(2, 2), SPECIALIZATION)


def test_old_megatron_is_named(monkeypatch):
    import torch

    from megatron_moe_spec import attach

    old = types.ModuleType("megatron.core")
    old.__version__ = "0.12.1"
    monkeypatch.setitem(sys.modules, "megatron.core", old)
    with pytest.raises(ImportError, match="0.12.1 is too old"):
        attach(torch.nn.Linear(2, 2), SPECIALIZATION)
