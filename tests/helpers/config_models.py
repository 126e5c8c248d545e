"""Parses flags with Megatron's own parser and validator and counts the model's parameters.

Reads {name: [processes, [flag, ...]]} from a JSON file, writes {name: what was found} to standard output.
In a process of its own: Megatron's arguments are global, and so is WORLD_SIZE.
"""

import json
import os
import sys
from pathlib import Path

from megatron_moe_spec.cpu import enable

ONE_PROCESS = """
    --tensor-model-parallel-size 1 --expert-model-parallel-size 1 --expert-tensor-parallel-size 1
    --transformer-impl local --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-persist-layer-norm
    --no-rope-fusion --no-initialization
""".split()


def parse(flags: list[str], world_size: int):
    """Megatron's validated arguments in a job of ``world_size`` processes."""
    from megatron.training.arguments import parse_args, validate_args

    from megatron_moe_spec.arguments import add_moe_spec_args

    os.environ.update(WORLD_SIZE=str(world_size), RANK="0", LOCAL_RANK="0")
    sys.argv = ["pretrain_gpt.py", *flags]
    return validate_args(parse_args(add_moe_spec_args))


def count(args) -> dict[str, int]:
    """Parameters of the model, in total and in use for each token."""
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.training.arguments import core_transformer_config_from_args
    from torch._subclasses.fake_tensor import FakeTensorMode

    if args.multi_latent_attention:
        args.qk_layernorm = False  # The latent's norm, hundreds of numbers a layer, needs Transformer Engine.
    config = core_transformer_config_from_args(args)
    spec = gpt_layer_specs.get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=args.normalization, qk_l2_norm=False
    )
    for layer in spec.layer_specs:
        attention = layer.submodules.self_attention.submodules
        # It has no parameters, and Megatron's local one does not know multi-latent attention.
        attention.core_attention = IdentityOp
    # Tensors without storage.
    with FakeTensorMode():
        model = GPTModel(
            config,
            spec,
            vocab_size=args.vocab_size,
            max_sequence_length=args.max_position_embeddings,
            position_embedding_type=args.position_embedding_type,
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        )
    sizes = {name: weight.numel() for name, weight in model.named_parameters()}
    total = sum(sizes.values())
    routed = sum(size for name, size in sizes.items() if ".experts." in name)
    return {
        "total": total,
        "active": total - routed + routed * config.moe_router_topk // config.num_moe_experts,
        "moe_layers": sum(name.endswith("router.weight") for name in sizes),
    }


def main() -> None:
    enable()
    import torch
    from grouped_linear import use_torch_grouped_linear
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.training.arguments import core_transformer_config_from_args

    use_torch_grouped_linear()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    found = {}
    for name, (processes, flags) in json.loads(Path(sys.argv[1]).read_text()).items():
        laid_out = parse(flags, processes)
        try:
            core_transformer_config_from_args(laid_out)
        except ValueError as error:
            # The last thing that it asks for, and all that may be missing here.
            if "install TE" not in str(error):
                raise
        found[name] = {
            "data_parallel": laid_out.data_parallel_size,
            "coefficients": [laid_out.moe_specialization_loss_coeff, laid_out.moe_coupling_loss_coeff],
            **count(parse([*flags, *ONE_PROCESS], 1)),
        }
    # Megatron prints as well.
    print(f"\n{json.dumps(found)}")


if __name__ == "__main__":
    main()
