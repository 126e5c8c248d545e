"""Bad use is refused at once, by an error that names the flag and the remedy."""

import argparse
import dataclasses
import sys
import types

import pytest
import torch
from loss_names import coefficients
from rule_texts import message_of

from megatron_moe_spec import SpecConfig
from megatron_moe_spec.arguments import add_moe_spec_args, spec_config_from_args
from megatron_moe_spec.integration.support.rules import RULES
from megatron_moe_spec.losses import LOSSES, Specialization
from megatron_moe_spec.losses.base import ACTIVATIONS, EXPERT_WEIGHTS, ROUTER_WEIGHT

SPECIALIZATION = SpecConfig(specialization_loss_coeff=1.0)
COUPLING = SpecConfig(coupling_loss_coeff=1.0)
ORTHOGONALITY = SpecConfig(orthogonality_loss_coeff=1.0)
VARIANCE = SpecConfig(score_variance_loss_coeff=1.0)
ERC = SpecConfig(erc_loss_coeff=1.0)


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
        ("specialization_a2a_dtype", "bf16", "--moe-specialization-a2a-dtype"),
        ("coupling_across_stages", "maybe", "--moe-coupling-across-stages"),
        ("orthogonality_loss_coeff", -1e-4, "--moe-orthogonality-loss-coeff"),
        ("score_variance_loss_coeff", float("inf"), "--moe-score-variance-loss-coeff"),
        ("erc_loss_coeff", "1", "--moe-erc-loss-coeff"),
        ("erc_alpha", -0.5, "--moe-erc-alpha"),
        ("router_orthogonality_loss_coeff", -1.0, "--moe-router-orthogonality-loss-coeff"),
        ("router_orthogonality_type", "cubed", "--moe-router-orthogonality-type"),
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
        "--moe-specialization-loss-coeff 2e-3 --moe-specialization-token-stride 4 "
        "--moe-specialization-a2a-dtype fp8 --moe-coupling-loss-coeff 1e-3 "
        "--moe-coupling-type pathway --moe-coupling-across-stages drop "
        "--moe-orthogonality-loss-coeff 1e-4 --moe-score-variance-loss-coeff 5e-3 "
        "--moe-erc-loss-coeff 0.5 --moe-erc-alpha 0.7 "
        "--moe-router-orthogonality-loss-coeff 0.01 --moe-router-orthogonality-type absolute "
        "--moe-spec-kernels torch --moe-spec-metrics-interval 10".split()
    )
    assert spec_config_from_args(args) == SpecConfig(
        specialization_loss_coeff=2e-3,
        specialization_token_stride=4,
        specialization_a2a_dtype="fp8",
        coupling_loss_coeff=1e-3,
        coupling_type="pathway",
        coupling_across_stages="drop",
        orthogonality_loss_coeff=1e-4,
        score_variance_loss_coeff=5e-3,
        erc_loss_coeff=0.5,
        erc_alpha=0.7,
        router_orthogonality_loss_coeff=0.01,
        router_orthogonality_type="absolute",
        kernels="torch",
        metrics_interval=10,
    )
    assert spec_config_from_args(parser.parse_args([])) == SpecConfig()


def test_messages_name_options_that_are_not_default():
    assert str(Specialization(2e-3)) == "specialization x 0.002"
    assert str(Specialization(2e-3, a2a_dtype="fp8")) == "specialization (a2a_dtype fp8) x 0.002"
    assert str(Specialization(2e-3, 4, "fp8")) == "specialization (token_stride 4, a2a_dtype fp8) x 0.002"
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
        (dict(moe_layer_freq=[0, 0, 0]), SPECIALIZATION, "--moe-layer-freq selects none .set --moe-layer-freq to 1"),
        (dict(moe_router_dtype="fp64"), SpecConfig(coupling_loss_coeff=1.0, kernels="triton"), "--moe-router-dtype"),
        (dict(moe_router_topk=1, moe_router_pre_softmax=True), ORTHOGONALITY, "--moe-router-topk"),
        (dict(gated_linear_unit=False), ERC, "--swiglu"),
        (dict(num_moe_experts=1, moe_router_topk=1, moe_router_pre_softmax=True), ERC, "--num-experts"),
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
        ("transformer_impl", "inference_optimized", "--transformer-impl"),
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


@pytest.mark.parametrize(
    "settings, expert_tensor_size, remedy",
    [
        (dict(moe_flex_dispatcher_backend="ncclep"), 1, "set --moe-flex-dispatcher-backend deepep or hybridep"),
        (dict(moe_expert_rank_capacity_factor=1.5), 1, "remove --moe-expert-rank-capacity-factor"),
        ({}, 2, "set --expert-tensor-parallel-size 1"),
    ],
)
def test_rows_that_cannot_be_followed_are_refused(settings, expert_tensor_size, remedy):
    dispatched = [rule for rule in RULES if "which token a row belongs to" in rule.message]
    assert len(dispatched) == 3
    for kind, number in (("flex", 1), ("alltoall", 0)):
        config = types.SimpleNamespace(moe_token_dispatcher_type=kind, **settings)
        model = types.SimpleNamespace(transformer_config=config, expert_tensor_size=expert_tensor_size)
        problems = [rule.text(model, Specialization()) for rule in dispatched if rule.applies(model, Specialization())]
        assert len(problems) == number and all(remedy in problem for problem in problems)


def test_rows_that_cannot_be_followed_are_refused_at_attach(megatron):
    import megatron_models

    from megatron_moe_spec import attach

    model = megatron_models.build_model()
    model.config.moe_token_dispatcher_type, model.config.moe_expert_rank_capacity_factor = "flex", 1.5
    attach(model, COUPLING).detach()
    for config in (SPECIALIZATION, ORTHOGONALITY):
        with pytest.raises(ValueError, match="remove --moe-expert-rank-capacity-factor"):
            attach(model, config)


@pytest.mark.parametrize("config", [SPECIALIZATION, COUPLING], ids=["rows", "pairs"])
@pytest.mark.parametrize("cuda", ["13.0", None])
def test_kernels_that_cannot_run_are_refused(mm, monkeypatch, config, cuda):
    """At attach where no device can run them; else the model may yet be moved to one, before its first forward."""
    from megatron_moe_spec import attach, kernels

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    kernels.choose.cache_clear()
    model, config = mm.build_model(), dataclasses.replace(config, kernels="triton")
    kernels_refused = message_of("--moe-spec-kernels triton where Triton cannot run")
    refused = pytest.raises(ValueError, match=f"{kernels_refused}NVIDIA GPU.*--moe-spec-kernels")
    if cuda is None:
        with refused:
            attach(model, config)
    else:
        attach(model, config)
        with refused:
            mm.run_model(model, mm.micro_batches(1)[0])
    kernels.choose.cache_clear()


@pytest.mark.parametrize("config", [SPECIALIZATION, COUPLING], ids=["rows", "pairs"])
def test_kernels_are_chosen_when_they_run(mm, monkeypatch, config):
    """Megatron makes routers on the CPU, and get_model calls its hooks before it moves the model to the GPU."""
    from megatron_moe_spec import attach
    from megatron_moe_spec.integration.taps import expert_rows as rows
    from megatron_moe_spec.integration.taps import pairs

    seen = []
    for module in (pairs, rows):
        choose = module.choose
        monkeypatch.setattr(module, "choose", lambda kernels, device: seen.append(device) or choose(kernels, device))
    model = mm.build_model()
    attach(model, config)
    assert not seen
    mm.run_model(model, mm.micro_batches(1)[0]).mean().backward()
    assert len(seen) >= 3 and set(seen) == {torch.device("cpu")}


def test_samples_with_ranks_of_their_own_are_refused(megatron):
    import megatron_models

    from megatron_moe_spec import attach

    model = megatron_models.build_model()
    model.config.hybrid_context_parallel = True
    with pytest.raises(ValueError, match="remove --hybrid-context-parallel"):
        attach(model, COUPLING)


def test_a_refused_model_was_never_attached(megatron, monkeypatch):
    import megatron_models

    from megatron_moe_spec import attach
    from megatron_moe_spec.integration.attach import SpecHandle

    monkeypatch.setattr(SpecHandle, "ever_attached", False)
    with pytest.raises(ValueError):
        attach(megatron_models.build_model(num_layers=1), COUPLING)
    assert not SpecHandle.ever_attached


@pytest.mark.parametrize(
    "config, field, value, flag",
    [
        (VARIANCE, "cuda_graph_impl", "transformer_engine", "--cuda-graph-impl"),
        (ERC, "fp4_param", True, "--fp4-param-gather"),
        (ERC, "moe_latent_size", 8, "--moe-latent-size"),
        (ERC, "overlap_moe_expert_parallel_comm", True, "--overlap-moe-expert-parallel-comm"),
        (ERC, "delay_wgrad_compute", True, "--delay-wgrad-compute"),
        (
            ERC,
            "overlap_dispatch_backward_with_experts_wgrad",
            True,
            "--overlap-dispatch-backward-with-experts-wgrad",
        ),
    ],
)
def test_setting_unsupported_by_a_loss_is_refused(megatron, config, field, value, flag):
    import megatron_models

    from megatron_moe_spec import attach

    model = megatron_models.build_model()
    setattr(model.config, field, value)
    with pytest.raises(ValueError, match=flag):
        attach(model, config)


@pytest.mark.parametrize("name", [loss.name for loss in LOSSES if loss.reads != ACTIVATIONS])
def test_fused_experts_are_refused_by_losses_of_activations_alone(megatron, name):
    """Before they run, fused experts call every pre-hook of their linear layers without an input."""
    import megatron_models

    from megatron_moe_spec import attach

    def build():
        model = megatron_models.build_model(moe_grouped_gemm=True)
        model.config.use_transformer_engine_op_fuser = True
        return model

    model = build()
    attach(model, SpecConfig(**coefficients([name])))
    for layer in model.decoder.layers:
        experts = layer.mlp.experts
        if hasattr(experts, "_make_fused_impl_pre_forward_hook"):
            experts._make_fused_impl_pre_forward_hook()(experts)
        for linear in (experts.linear_fc1, experts.linear_fc2):
            assert not any(module._forward_pre_hooks for module in linear.modules())
    # What is measured besides needs activations, too.
    with pytest.raises(ValueError, match="or set --moe-specialization-loss-coeff and --moe-spec-metrics-interval to 0"):
        attach(build(), SpecConfig(**coefficients([name]), metrics_interval=1))


def test_settings_that_matter_to_other_losses_only_are_allowed(megatron):
    import megatron_models

    from megatron_moe_spec import attach

    attach(megatron_models.build_model(moe_router_topk=1, moe_router_pre_softmax=True, num_layers=1), VARIANCE)
    attach(megatron_models.build_model(moe_router_topk=1, moe_router_pre_softmax=True, num_layers=1), ERC)
    attach(megatron_models.build_model(gated_linear_unit=False), ORTHOGONALITY)


def test_experts_without_weights_of_their_own_are_refused_by_erc(megatron):
    import megatron_models

    from megatron_moe_spec import attach

    model = megatron_models.build_model(moe_grouped_gemm=True)
    linear = model.decoder.layers[0].mlp.experts.linear_fc1
    linear.weight = torch.nn.Parameter(torch.stack([linear.weight0, linear.weight1]))
    del linear.weight0
    with pytest.raises(ValueError, match="--moe-single-grouped-weight"):
        attach(model, ERC)


def _model_with_graphs(scope, implementation="transformer_engine", **settings):
    """Set on a model that exists: Megatron itself builds some of these only on a GPU."""
    import megatron_models

    model = megatron_models.build_model()
    name = "cuda_graph_modules" if hasattr(model.config, "cuda_graph_modules") else "cuda_graph_scope"
    for field, value in {"cuda_graph_impl": implementation, name: scope, **settings}.items():
        setattr(model.config, field, value)
    return model


PREPROCESS = ["attn", "moe_router", "moe_preprocess"]


@pytest.mark.parametrize("scope", [["attn"], ["moe_router"], ["attn", "moe_router"], PREPROCESS, "attn,moe_router"])
def test_cuda_graphs_up_to_the_dispatch_are_allowed(megatron, scope):
    from megatron_moe_spec import attach

    attach(_model_with_graphs(scope), SPECIALIZATION)


@pytest.mark.parametrize(
    "scope, settings, flag",
    [
        (["moe"], {}, "--cuda-graph-scope attn moe_router"),
        ([], {}, "--cuda-graph-scope attn moe_router"),
        ("full", {}, "--cuda-graph-scope attn moe_router"),
        ([], dict(implementation="full_iteration"), "--cuda-graph-impl transformer_engine"),
        (["attn"], dict(implementation="local"), "--cuda-graph-impl transformer_engine"),
        (["moe_router"], dict(implementation="local", is_hybrid_model=True), "--cuda-graph-impl transformer_engine"),
        (["moe_router"], dict(implementation="none", enable_cuda_graph=True), "--cuda-graph-impl transformer_engine"),
        (["moe_router"], dict(moe_input_jitter_eps=0.1), "--moe-input-jitter-eps"),
        (PREPROCESS, dict(moe_latent_size=8), "--moe-latent-size.*--cuda-graph-scope attn moe_router"),
        (PREPROCESS, dict(moe_expert_capacity_factor=1.0), "--moe-expert-capacity-factor"),
        (PREPROCESS, dict(moe_router_padding_for_quantization=True), "--moe-router-padding-for-quantization"),
    ],
)
def test_other_cuda_graphs_are_refused(megatron, scope, settings, flag):
    from megatron_moe_spec import attach

    with pytest.raises(ValueError, match=flag):
        attach(_model_with_graphs(scope, **settings), SPECIALIZATION)


def test_cuda_graphs_over_an_adapted_router_are_refused(megatron):
    from megatron_moe_spec import attach

    model = _model_with_graphs(["moe_router"])
    for layer in model.decoder.layers:
        adapted = torch.nn.Module()
        adapted.to_wrap = layer.mlp.router
        layer.mlp.router = adapted
    with pytest.raises(ValueError, match=message_of("CUDA graphs over adapted routers") + ".*--cuda-graph-scope attn"):
        attach(model, SPECIALIZATION)


def test_cuda_graphs_of_attention_layers_of_a_hybrid_model_are_allowed(megatron):
    from megatron_moe_spec import attach

    attach(_model_with_graphs(["attn"], "local", is_hybrid_model=True), SPECIALIZATION)


def test_cuda_graphs_that_serve_inference_alone_are_allowed(megatron, monkeypatch):
    from megatron_moe_spec import attach

    block = types.SimpleNamespace(name="block")
    attach(_model_with_graphs([], "local", inference_cuda_graph_scope=block), SPECIALIZATION)
    # Megatron-RL switches them off in training.
    args = types.SimpleNamespace(perform_rl_step=True, rl_training_cuda_graphs=False)
    program = types.SimpleNamespace(_GLOBAL_ARGS=args)
    monkeypatch.setitem(sys.modules, "megatron.training.global_vars", program)
    attach(_model_with_graphs([], "local"), SPECIALIZATION)
    args.rl_training_cuda_graphs = True
    with pytest.raises(ValueError, match="--cuda-graph-impl"):
        attach(_model_with_graphs([], "local"), SPECIALIZATION)
    program._GLOBAL_ARGS = types.SimpleNamespace(moe_pad_experts_for_cuda_graph_inference=True)
    attach(_model_with_graphs([], "local"), SPECIALIZATION)
    with pytest.raises(ValueError, match="--cuda-graph-impl"):
        attach(_model_with_graphs([], "full_iteration"), SPECIALIZATION)


def test_a_layer_that_is_captured_whole_all_the_same_is_an_error(megatron):
    from megatron.core.transformer import cuda_graphs

    from megatron_moe_spec import attach

    model = _model_with_graphs([], "none")
    attach(model, SPECIALIZATION)
    cuda_graphs._set_capture_start()
    try:
        with pytest.raises(RuntimeError, match=message_of("CUDA graphs over MoE layers, made by no setting")) as error:
            model.decoder.layers[0](torch.ones(4, 2, 16), attention_mask=None)
        assert "--cuda-graph-impl" in str(error.value)
        model.eval()
        model.decoder.layers[0](torch.ones(4, 2, 16), attention_mask=None)
    finally:
        cuda_graphs._set_capture_end()


def test_legacy_grouped_gemm_is_refused(megatron):
    """Its experts are two bare weights: there is no down-projection module to tap."""
    import megatron_models

    from megatron_moe_spec import attach

    model = megatron_models.build_model()
    for layer in model.decoder.layers:
        layer.mlp.experts = torch.nn.Module()
    for config, rule in (
        (SPECIALIZATION, "legacy GroupedMLP"),
        (ORTHOGONALITY, "legacy GroupedMLP"),
        (ERC, "one weight for all experts"),
    ):
        with pytest.raises(ValueError, match=message_of(rule) + ".*--moe-use-legacy-grouped-gemm"):
            attach(model, config)
    attach(model, COUPLING)


def test_model_without_moe_layers_is_refused(megatron):
    from megatron_moe_spec import attach

    with pytest.raises(ValueError, match="--num-experts"):
        attach(torch.nn.Linear(2, 2), SPECIALIZATION)


class MixtureOfExperts(torch.nn.Module):
    """An MoE layer of a fork, not derived from Megatron's."""

    def __init__(self, layer):
        super().__init__()
        self.router, self.experts = layer.router, layer.experts


def test_other_moe_layers_than_megatrons_are_named(megatron, caplog):
    import megatron_models

    from megatron_moe_spec import attach

    model = megatron_models.build_model()
    for layer in model.decoder.layers[1:]:
        layer.mlp = MixtureOfExperts(layer.mlp)
    handle = attach(model, SPECIALIZATION)
    assert handle.layers == ["decoder.layers.0.mlp"]
    assert list(handle.skipped) == ["decoder.layers.1.mlp", "decoder.layers.2.mlp"]
    assert "decoder.layers.2.mlp (a test_refusals.MixtureOfExperts, not Megatron's MoELayer)" in caplog.text
    handle.detach()
    model.decoder.layers[0].mlp = MixtureOfExperts(model.decoder.layers[0].mlp)
    with pytest.raises(ValueError, match="decoder.layers.0.mlp .a test_refusals.MixtureOfExperts.*derive the class"):
        attach(model, SPECIALIZATION)


def test_routing_at_random_is_said(megatron, caplog):
    import megatron_models

    from megatron_moe_spec import attach

    attach(megatron_models.build_model(moe_router_force_load_balancing=True), SPECIALIZATION)
    assert "--moe-router-force-load-balancing replaces the routers' logits" in caplog.text


class FullyShardedDataParallel(torch.nn.Module):
    """By its name a wrapper that leaves each rank a shard of each weight."""

    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize("name", [loss.name for loss in LOSSES if loss.reads in (ROUTER_WEIGHT, EXPERT_WEIGHTS)])
def test_sharded_weights_are_refused(megatron, name):
    import megatron_models

    from megatron_moe_spec import attach

    with pytest.raises(ValueError, match=f"FSDP.*--moe-{name.replace('_', '-')}-coeff to 0"):
        attach(FullyShardedDataParallel(megatron_models.build_model()), SpecConfig(**coefficients([name])))
    attach(FullyShardedDataParallel(megatron_models.build_model()), SPECIALIZATION)


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
    from megatron_moe_spec import attach

    monkeypatch.setitem(sys.modules, "megatron.core", None)
    with pytest.raises(ImportError, match="pip install 'megatron-core"):
        attach(torch.nn.Linear(2, 2), SPECIALIZATION)


def test_old_megatron_is_named(monkeypatch):
    from megatron_moe_spec import attach

    old = types.ModuleType("megatron.core")
    old.__version__ = "0.16.0"
    monkeypatch.setitem(sys.modules, "megatron.core", old)
    with pytest.raises(ImportError, match="0.16.0 is too old: 0.16.1 or newer"):
        attach(torch.nn.Linear(2, 2), SPECIALIZATION)
