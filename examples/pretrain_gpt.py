"""Pretrain a GPT model with Megatron's own training loop.

A plain Megatron script for megatron-core >= 0.17, whose wheel contains ``megatron.training`` but no pretraining script.
It takes Megatron's own flags and nothing else:

    torchrun --nproc-per-node 8 examples/pretrain_gpt.py --num-layers 12 ... --data-path my_text_document
    torchrun --nproc-per-node 8 examples/pretrain_gpt.py --num-layers 12 ... --mock-data
"""

import importlib.util
from functools import partial
from inspect import signature

import megatron.core.datasets.utils
import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank
from megatron.training import argument_utils, arguments, get_args, get_timers, pretrain, print_rank_0
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

BATCH_KEYS = ("tokens", "position_ids", "attention_mask", "labels", "loss_mask")


def get_batch(data_iterator, vp_stage):
    """The next micro-batch, cut to this context-parallel rank; ``None`` for each field on a middle pipeline stage."""
    if not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys(BATCH_KEYS)
    sample = next(data_iterator)
    batch = {key: sample[key].cuda(non_blocking=True) if key in sample else None for key in BATCH_KEYS}
    hybrid = {"is_hybrid_cp": False} if "is_hybrid_cp" in signature(get_batch_on_this_cp_rank).parameters else {}
    return get_batch_on_this_cp_rank(batch, cp_group=parallel_state.get_context_parallel_group(), **hybrid)


def loss_func(loss_mask, losses):
    """Sum of the token losses, the number of tokens, and both as what Megatron logs."""
    loss_mask = loss_mask.view(-1).float()
    loss = (losses.view(-1).float() * loss_mask).sum()
    num_tokens = loss_mask.sum().to(torch.int)
    report = torch.stack([loss.detach(), num_tokens.to(loss.dtype)])
    return loss, num_tokens, {"lm loss": report}


def forward_step(data_iterator, model):
    """Run the model on one micro-batch, as Megatron's schedules call for it."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output, partial(loss_func, batch["loss_mask"])


def train_valid_test_datasets_provider(num_samples, vp_stage=None):
    """Build the three datasets from ``--data-path`` and its relatives, or mock ones with ``--mock-data``."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )
    print_rank_0("> building train, validation and test datasets ...")
    dataset_class = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(
        dataset_class, num_samples, partial(is_first_or_last_pipeline_stage, vp_stage), config
    ).build()


# Every tensor-parallel rank reads its own copy of the batch, so that nothing is broadcast.
train_valid_test_datasets_provider.is_distributed = True


def use_shipped_helpers():
    """Megatron compiles its data set helpers by ``make``; the wheel holds them compiled, but no Makefile."""
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp"):
        megatron.core.datasets.utils.compile_helpers = lambda: None


def model_provider(pre_process=True, post_process=True, vp_stage=None, config=None, pg_collection=None):
    """Build the model, or one pipeline stage of it; from 0.19 Megatron does so itself."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    args = get_args()
    config = config or arguments.core_transformer_config_from_args(args)
    layers = get_gpt_decoder_block_spec(
        config, args.transformer_impl == "transformer_engine", args.normalization, args.qk_l2_norm, vp_stage=vp_stage
    )
    return GPTModel(
        config,
        layers,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


def train(step=forward_step, extra_args_provider=None, model_config=None):
    """Parse the flags and train.

    Args:
        step: runs the model on one micro-batch.
        extra_args_provider: adds flags of a script's own to Megatron's parser.
        model_config: makes the model's settings of the arguments, from 0.19; by default a GPT model's.
    """
    use_shipped_helpers()
    parts = (train_valid_test_datasets_provider, model_provider, ModelType.encoder_or_decoder, step)
    parsing = {"args_defaults": {"tokenizer_type": "GPT2BPETokenizer"}, "extra_args_provider": extra_args_provider}
    if not hasattr(arguments, "parse_and_validate_args"):  # 0.17
        pretrain(*parts, **parsing)
        return
    args = arguments.parse_and_validate_args(**parsing)
    if not hasattr(argument_utils, "gpt_config_from_args"):  # 0.18
        pretrain(argument_utils.pretrain_cfg_container_from_args(args), *parts)
    else:
        model_config = model_config or argument_utils.gpt_config_from_args
        settings = argument_utils.pretrain_cfg_container_from_args(args, model_config(args))
        pretrain(settings, parts[0], *parts[2:])


def main():
    train()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
