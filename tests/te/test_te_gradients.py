"""What Megatron has with Transformer Engine alone: gradients and values equal autograd's through the pure losses.

``make test-te`` runs ``test_gradients.py`` on models of the Transformer Engine spec as well, for recomputation,
dispatchers, capacity, padding and biases.
"""

import contextlib
from unittest import mock

import pytest
import torch
from loss_names import BOTH, LOSS_NAMES, PEERS, coefficients
from test_gradients import FULL, SELECTIVE, _compare
from test_layouts import FULL_RECOMPUTE, SIGMOID

GROUPED = dict(moe_grouped_gemm=True)
ROUTER = dict(moe_router_fusion=True)
GROUPS = dict(num_moe_experts=8, moe_router_num_groups=4, moe_router_group_topk=2)
SHARED = dict(moe_shared_expert_intermediate_size=16)
ACTIVATION = dict(use_te_activation_func=True)
MLA = dict(
    multi_latent_attention=True, q_lora_rank=8, kv_lora_rank=8, qk_head_dim=8, qk_pos_emb_head_dim=4, v_head_dim=8
)
GATED_DELTA_NET = dict(
    experimental_attention_variant="gated_delta_net", linear_attention_freq=2, linear_conv_kernel_dim=2,
    linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=2,
    deterministic_mode=True,
)  # fmt: skip

# name -> (fields of TransformerConfig, the extension's functions that have to be called)
MODES = {
    "TEGroupedMLP": (GROUPED, ["te_general_grouped_gemm"]),
    "SequentialMLP": ({}, ["generic_gemm", "rmsnorm_bwd"]),
    "fused router": (ROUTER, ["fused_topk_with_score_function_bwd"]),
    "fused router, before softmax": (dict(moe_router_pre_softmax=True, **ROUTER), []),
    "fused router, sigmoid with bias": (dict(**ROUTER, **SIGMOID), []),
    "fused router, groups": (dict(**ROUTER, **SIGMOID, **GROUPS), []),
    "fused router, sqrtsoftplus": (dict(moe_router_score_function="sqrtsoftplus", **ROUTER), []),
    "fused router and load-balancing loss": (
        dict(moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.0, **ROUTER),
        [],
    ),
    "activation": (dict(**GROUPED, **ACTIVATION), ["swiglu", "dswiglu"]),
    "activation, moe_act recompute": (dict(**GROUPED, **ACTIVATION, **SELECTIVE, recompute_modules=["moe_act"]), []),
    "activation, sequential": (ACTIVATION, []),
    "gated shared expert": (dict(moe_shared_expert_gate=True, **SHARED), []),
    "overlapped shared expert": (dict(moe_shared_expert_overlap=True, **GROUPED, **SHARED), []),
    "shared expert recompute": (dict(**SHARED, **SELECTIVE, recompute_modules=["shared_experts"]), []),
    "layernorm recompute": (dict(**GROUPED, **SELECTIVE, recompute_modules=["layernorm"]), ["rmsnorm_fwd"]),
    "layernorm and moe_act recompute": (dict(**GROUPED, **SELECTIVE, recompute_modules=["layernorm", "moe_act"]), []),
    "LayerNorm": (dict(normalization="LayerNorm"), ["layernorm_bwd"]),
    "zero-centred norms": (dict(layernorm_zero_centered_gamma=True), []),
    "fused rotary embedding, norms of queries and keys": (
        dict(apply_rope_fusion=True, qk_layernorm=True),
        ["fused_rope_backward"],
    ),
    "latent experts": (dict(moe_latent_size=8, **GROUPED), []),
    "multi-latent attention": (MLA, []),
    "gated delta net": (GATED_DELTA_NET, []),
}
# Its weights are of the latent size, the router's of the model's.
WITHOUT_ERC = {"latent experts"}


def _forward_is_the_same(settings: dict, names) -> None:
    import megatron_models

    from megatron_moe_spec import SpecConfig, attach

    (batch,) = megatron_models.micro_batches(1)
    plain, model = megatron_models.build_model(**settings), megatron_models.build_model(**settings)
    keys = list(model.state_dict())
    attach(model, SpecConfig(kernels="torch", **coefficients(names)))
    assert torch.equal(megatron_models.run_model(plain, batch), megatron_models.run_model(model, batch))
    assert list(model.state_dict()) == keys


def _stand_in_for_flash_linear_attention(monkeypatch) -> None:
    """For ``fla.modules.l2norm``, all that Megatron's deterministic gated delta net takes of that package."""
    from megatron.core.ssm.gated_delta_net import common

    def l2norm(x, dim=-1, eps=1e-6):
        return torch.nn.functional.normalize(x, dim=dim, eps=eps)

    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    monkeypatch.setattr(common, "HAVE_FLA", True)
    monkeypatch.setattr(common, "l2norm", l2norm)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_equal_autograd(calls, mode, monkeypatch):
    settings, expected = MODES[mode]
    if settings is GATED_DELTA_NET:
        _stand_in_for_flash_linear_attention(monkeypatch)
    names = [name for name in LOSS_NAMES if not (name == "erc_loss" and mode in WITHOUT_ERC)]
    _forward_is_the_same(settings, names)
    _compare(settings, {}, names=names)
    assert calls.keys() >= set(expected)


@pytest.mark.parametrize("names", [BOTH, ["orthogonality_loss"]], ids=["both", "orthogonality"])
@pytest.mark.parametrize("offloads", [["moe_act"], ["expert_fc1"], ["expert_fc1", "moe_act"]], ids="+".join)
def test_offloaded_activations(calls, offloads, names):
    """Megatron's fine-grained offloading, which packs what experts save for backward."""
    fields = dict(
        fine_grained_activation_offloading=True, offload_modules=offloads, min_offloaded_tensor_size=1, **GROUPED
    )
    _compare(fields, {}, names=names, reference=GROUPED)


def test_probabilities_on_the_input(calls):
    """Of one expert a token, as Megatron demands: losses that compare a token's experts are refused."""
    fields = dict(moe_apply_probs_on_input=True, moe_router_topk=1, moe_router_score_function="sigmoid", **GROUPED)
    names = ["coupling_loss", "score_variance_loss", "router_orthogonality_loss", "erc_loss"]
    _forward_is_the_same(fields, names)
    _compare(fields, {}, names=names)


@contextlib.contextmanager
def _checkpoints_of_transformer_engine():
    """Has Megatron recompute through Transformer Engine's checkpoint, as it does with fp8 and fp4."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.extensions.transformer_engine import te_checkpoint

    def checkpoint(function, distributes, *args):
        tracker = tensor_parallel.random.get_cuda_rng_tracker
        group = parallel_state.get_tensor_model_parallel_group()
        return te_checkpoint(function, distributes, tracker, group, *args)

    with mock.patch.object(tensor_parallel, "checkpoint", side_effect=checkpoint) as called:
        yield
    assert called.call_count


@pytest.mark.parametrize("names", [BOTH, PEERS], ids=["both", "peers"])
@pytest.mark.parametrize(
    "recompute",
    [
        dict(**GROUPED, **FULL_RECOMPUTE),
        FULL_RECOMPUTE,
        dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=2, num_layers=4),
        dict(recompute_method="block", **FULL),
        dict(**GROUPED, **SELECTIVE, recompute_modules=["moe"]),
    ],
    ids=["full, grouped", "full", "full, two layers", "block", "moe"],
)
def test_recomputation_by_transformer_engine(calls, recompute, names):
    with _checkpoints_of_transformer_engine():
        _compare(recompute, {}, names=names)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [FULL_RECOMPUTE, {}], ids=["full", "none"])
def test_kernels(calls, recompute):
    """Under Triton's interpreter, with the SwiGLU's gradient in them."""
    settings = dict(bias_activation_fusion=True, **GROUPED, **recompute)
    with _checkpoints_of_transformer_engine() if recompute else contextlib.nullcontext():
        _compare(settings, {}, options=dict(kernels="triton"))


@pytest.mark.slow
@pytest.mark.parametrize("pads", [{}, dict(fp8="hybrid"), dict(fp8="hybrid", moe_router_padding_for_quantization=True)])
def test_fused_permutation(calls, pads, monkeypatch):
    """Transformer Engine's own Triton kernels, in the interpreter; with rows padded as for fp8, without quantizers."""
    from megatron.core.transformer import transformer_block
    from transformer_engine.pytorch.triton import permutation

    monkeypatch.setattr(transformer_block, "get_fp8_context", lambda *args, **kwargs: contextlib.nullcontext())
    settings, names = dict(num_layers=2, moe_ffn_hidden_size=32, **GROUPED), [*BOTH, "orthogonality_loss"]
    with mock.patch.object(permutation, "permute_with_mask_map", wraps=permutation.permute_with_mask_map) as kernel:
        _compare(dict(moe_permute_fusion=True, **settings, **pads), {}, names=names, reference=settings)
    assert kernel.call_count


SWIGLU_MODES = {
    "plain": ({}, True),
    "full recompute": (FULL_RECOMPUTE, True),
    "moe_act recompute": (dict(**SELECTIVE, recompute_modules=["moe_act"]), False),
    "Transformer Engine's activation": (dict(bias_activation_fusion=False, **ACTIVATION), False),
    "biases": (dict(add_bias_linear=True), True),  # which its linear layer has added
    "offloaded": (
        dict(
            fine_grained_activation_offloading=True,
            offload_modules=["moe_act"],
            min_offloaded_tensor_size=1,
        ),
        False,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", SWIGLU_MODES)
def test_where_the_swiglu_is_replaced(megatron, mode, monkeypatch):
    from megatron_moe_spec.kernels import swiglu

    settings, replaced = SWIGLU_MODES[mode]
    seen, gradient = [], swiglu.swiglu_gradient
    monkeypatch.setattr(swiglu, "swiglu_gradient", lambda *args: seen.append(1) or gradient(*args))
    settings = {"bias_activation_fusion": True, "num_layers": 2, **GROUPED, **settings}
    reference = {name: value for name, value in settings.items() if "offload" not in name}
    _compare(settings, {}, names=["specialization_loss"], reference=reference, options=dict(kernels="triton"))
    layers, micro_batches = 2, 3
    assert len(seen) == (layers * micro_batches if replaced else 0)
