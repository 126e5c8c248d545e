"""Small HybridModels of a layer pattern, without mamba-ssm: of Megatron's own specification where Transformer Engine is
there, else in plain torch.

``--spec hybrid_models stack_spec`` gives Megatron's training program the same layers. Import only after the CPU backend
is enabled, and where Megatron has HybridModel (``processes.needs_hybrid_model``).
"""

from dataclasses import replace
from functools import partial

import megatron_models
import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.hybrid import hybrid_block
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)
from processes import HAS_TRANSFORMER_ENGINE

if not HAS_TRANSFORMER_ENGINE:
    hybrid_block.TENorm = WrappedTorchNorm  # of the final norm, which HybridStack takes from no spec


def build_model(pattern: str, seed: int = 0, **settings) -> HybridModel:
    """A HybridModel in one piece; ``settings`` override TransformerConfig's fields."""
    config = megatron_models.transformer_config(**_fields(pattern), **settings)
    return _build_stage(pattern, config, seed)


def build_chunks(pattern: str, **settings) -> list[HybridModel]:
    """The same as this rank's chunks of a pipeline, see ``of_stages``."""
    return megatron_models.build_chunks(partial(_build_stage, pattern), **_fields(pattern), **settings)


def of_stages(pattern: str, number: int) -> str:
    """The pattern with every so many of its segments joined that a number of (virtual) stages is left."""
    main, *mtp = pattern.split("/")
    segments = main.split("|")
    length, rest = divmod(len(segments), number)
    assert rest == 0, f"{main} has {len(segments)} segments, not a multiple of {number}"
    stages = ["".join(segments[i : i + length]) for i in range(0, len(segments), length)]
    return "/".join(["|".join(stages), *mtp])


def _fields(pattern: str) -> dict:
    """What Megatron's arguments make of a pattern."""
    main, *mtp = pattern.split("/")
    return dict(num_layers=len(main.replace("|", "")), is_hybrid_model=True, mtp_num_layers=len(mtp) or None)


def _build_stage(pattern: str, config, seed: int, **stage) -> HybridModel:
    model = HybridModel(
        config,
        stack_spec,
        megatron_models.VOCABULARY,
        megatron_models.SEQUENCE,
        hybrid_layer_pattern=pattern,
        position_embedding_type="rope",
        **stage,
    )
    return megatron_models.set_weights(model, seed)


class TorchMixer(MegatronModule):
    """Stands for ``megatron.core.ssm.mamba_mixer.MambaMixer``, whose kernels need a GPU, with a recurrence of its kind.

    The contract is what ``MambaLayer`` calls: ``MambaMixer(config, d_model=, layer_number=, pg_collection=,
    pp_layer_offset=, name=)``, and ``forward(hidden_states, inference_context=, packed_seq_params=) -> (output, bias)``
    with hidden_states [s, b, h]; under sequence parallelism s is a shard, which in_proj gathers and out_proj scatters.
    Each channel's state decays as its input says. Inference, packed sequences and context parallelism are not there.
    """

    def __init__(self, config, d_model, layer_number=None, pg_collection=None, pp_layer_offset=0, name=None):
        super().__init__(config)
        linear = dict(
            config=config,
            init_method=config.init_method,
            bias=False,
            skip_bias_add=True,
            tp_group=pg_collection.tp,
        )
        # A channel's value and decay are neighbours, so that tensor-parallel ranks divide channels.
        self.in_proj = ColumnParallelLinear(d_model, 2 * d_model, gather_output=False, **linear)
        self.out_proj = RowParallelLinear(d_model, d_model, input_is_parallel=True, **linear)

    def forward(self, hidden_states, inference_context=None, *, inference_params=None, packed_seq_params=None):
        assert inference_context is None and inference_params is None and packed_seq_params is None
        projected, _ = self.in_proj(hidden_states)
        values, decays = projected.unflatten(-1, (-1, 2)).unbind(-1)
        decays = decays.sigmoid()
        state, states = torch.zeros_like(values[0]), []
        for value, decay in zip(values, decays):
            state = decay * state + (1 - decay) * value
            states.append(state)
        return self.out_proj(torch.stack(states))


def _stack_spec() -> ModuleSpec:
    """As ``megatron.core.models.hybrid.hybrid_layer_specs.hybrid_stack_spec``, of GPT's local layers."""
    experts, dense = (
        get_gpt_layer_local_spec(num_experts=number, normalization="RMSNorm").submodules for number in (8, None)
    )
    attention = TransformerLayerSubmodules(
        input_layernorm=experts.input_layernorm,
        self_attention=experts.self_attention,
        self_attn_bda=experts.self_attn_bda,
    )
    mlp, moe = (
        TransformerLayerSubmodules(pre_mlp_layernorm=x.pre_mlp_layernorm, mlp=x.mlp, mlp_bda=x.mlp_bda)
        for x in (dense, experts)
    )
    mamba = MambaLayerSubmodules(
        norm=WrappedTorchNorm, mixer=ModuleSpec(module=TorchMixer), mamba_bda=get_bias_dropout_add
    )
    mtp = MultiTokenPredictionLayerSubmodules(
        enorm=WrappedTorchNorm,
        hnorm=WrappedTorchNorm,
        eh_proj=ColumnParallelLinear,
        mtp_model_layer=None,  # built of the pattern
        layer_norm=WrappedTorchNorm,
    )
    mtp_layers = [ModuleSpec(module=MultiTokenPredictionLayer, submodules=mtp)]
    return ModuleSpec(
        module=HybridStack,
        submodules=HybridStackSubmodules(
            mamba_layer=ModuleSpec(module=MambaLayer, submodules=mamba),
            attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
            mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
            moe_layer=ModuleSpec(module=MoETransformerLayer, submodules=moe),
            mtp_block_spec=ModuleSpec(
                module=MultiTokenPredictionBlock,
                submodules=MultiTokenPredictionBlockSubmodules(layer_specs=mtp_layers),
            ),
        ),
    )


def _with_torch_mixer(spec: ModuleSpec) -> ModuleSpec:
    submodules = replace(spec.submodules, mamba_layer=_stack_spec().submodules.mamba_layer)
    return replace(spec, submodules=submodules)


stack_spec = _with_torch_mixer(hybrid_stack_spec) if HAS_TRANSFORMER_ENGINE else _stack_spec()
