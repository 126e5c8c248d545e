"""Pretrain a small Mixture-of-Experts GPT with a training loop on megatron.core alone.

For those who have their own loop, or Megatron-Core without ``megatron.training`` (0.16). What the losses add to the
loop: ``add_moe_spec_args`` for their flags, ``attach`` once the model is built, ``handle.end_step`` once a step, and
``MetricsWriter`` for what that returns.

    torchrun --nproc-per-node 2 examples/pretrain_core.py --data-path my_text_document --output build/run \\
        --moe-specialization-loss-coeff 2e-3 --moe-coupling-loss-coeff 1e-3

Trains in fp32 with data parallelism. The dataset has Megatron's indexed format, a token a byte, 256 the end of a
document: examples/quickstart/data.py makes one. ``--cpu`` is for trying things out, not for real training. The output
folder gets log.jsonl, a line an iteration, and moe_spec_metrics.jsonl, one every ``--moe-spec-metrics-interval``.
"""

import argparse
import os
import sys
import time
from functools import partial
from pathlib import Path

if "--cpu" in sys.argv:
    # Megatron binds names of torch when it is imported: this has to come first.
    from megatron_moe_spec.cpu import enable

    enable()

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_moe_spec import MetricsWriter, attach
from megatron_moe_spec.arguments import add_moe_spec_args, spec_config_from_args
from megatron_moe_spec.metrics.json_lines import JsonLines
from megatron_moe_spec.metrics.writer import METRICS_FILE


class ByteTokenizer:
    """The tokenizer that GPTDataset asks for, of text that is stored as bytes."""

    eod = 256
    vocab_size = 257
    unique_identifiers = {"class": "ByteTokenizer"}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="run without a GPU")
    parser.add_argument("--data-path", required=True, help="PREFIX of the dataset's PREFIX.bin and PREFIX.idx")
    parser.add_argument("--data-cache-path", help="folder for the dataset's indices (default: beside the dataset)")
    parser.add_argument("--split", default="90,5,5", help="shares of training, validation and test (%(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="folder for the logs")

    model = parser.add_argument_group("model")
    model.add_argument("--num-layers", type=int, default=4)
    model.add_argument("--hidden-size", type=int, default=64)
    model.add_argument("--num-attention-heads", type=int, default=4)
    model.add_argument("--num-query-groups", type=int, default=2)
    model.add_argument("--seq-length", type=int, default=128)
    model.add_argument("--num-experts", type=int, default=16)
    model.add_argument("--moe-router-topk", type=int, default=2)
    model.add_argument("--moe-ffn-hidden-size", type=int, default=64)
    model.add_argument("--moe-shared-expert-intermediate-size", type=int, default=64)
    model.add_argument("--init-method-std", type=float, default=0.1, help="of initial weights (%(default)s)")
    model.add_argument("--moe-aux-loss-coeff", type=float, default=1e-2, help="load balancing (%(default)s)")

    training = parser.add_argument_group("training")
    training.add_argument("--iterations", type=int, default=600)
    training.add_argument("--seed", type=int, default=1234, help="of weights and data order (%(default)s)")
    training.add_argument("--micro-batch-size", type=int, default=4)
    training.add_argument("--global-batch-size", type=int, default=8)
    training.add_argument("--lr", type=float, default=5e-3)
    training.add_argument("--min-lr", type=float, default=5e-4)
    training.add_argument("--lr-warmup-iters", type=int, default=20, help="at most half of the run (%(default)s)")
    training.add_argument("--weight-decay", type=float, default=0.01)
    training.add_argument("--eval-interval", type=int, default=100, help="and after the last one (%(default)s)")
    training.add_argument("--eval-iters", type=int, default=20, help="global batches an evaluation (%(default)s)")
    return add_moe_spec_args(parser).parse_args()


def initialize(args):
    """Join the job: one process a GPU, all of them data parallel."""
    if not args.cpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo" if args.cpu else "nccl")
    parallel_state.initialize_model_parallel()
    torch.manual_seed(args.seed)
    model_parallel_cuda_manual_seed(args.seed)
    per_micro_step = args.micro_batch_size * parallel_state.get_data_parallel_world_size()
    if args.global_batch_size % per_micro_step:
        raise SystemExit(f"--global-batch-size must be a multiple of {per_micro_step}: micro-batch size x processes")
    return args.global_batch_size // per_micro_step


def build_model(args):
    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        ffn_hidden_size=args.moe_ffn_hidden_size,
        num_moe_experts=args.num_experts,
        moe_router_topk=args.moe_router_topk,
        moe_ffn_hidden_size=args.moe_ffn_hidden_size,
        moe_shared_expert_intermediate_size=args.moe_shared_expert_intermediate_size,
        init_method_std=args.init_method_std,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=args.moe_aux_loss_coeff,
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
    model = GPTModel(
        config,
        get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm"),
        vocab_size=-(-ByteTokenizer.vocab_size // 64) * 64,
        max_sequence_length=args.seq_length,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    ).cuda()
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True)
    return DistributedDataParallel(config, ddp_config, model)


def build_optimizer(model, args):
    """Adam, sharded over the data-parallel ranks, and its cosine schedule, counted in samples."""
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=args.lr,
            min_lr=args.min_lr,
            weight_decay=args.weight_decay,
            clip_grad=1.0,
            use_distributed_optimizer=True,
        ),
        [model],
    )
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=min(args.lr_warmup_iters, args.iterations // 2) * args.global_batch_size,
        lr_decay_steps=args.iterations * args.global_batch_size,
        lr_decay_style="cosine",
        start_wd=args.weight_decay,
        end_wd=args.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    model.config.grad_scale_func = optimizer.scale_loss
    model.config.finalize_model_grads_func = finalize_model_grads
    return optimizer, scheduler


def build_datasets(args):
    """Training and validation samples, in an order that depends on the seed alone."""
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=([args.data_path], None),
        split=args.split,
        path_to_cache=args.data_cache_path,
        tokenizer=ByteTokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    sizes = [args.iterations * args.global_batch_size, args.eval_iters * args.global_batch_size, None]
    training, validation, _ = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
    if training is None or validation is None:
        raise SystemExit(f"--split {args.split} leaves no documents of {args.data_path} for training or validation")
    return training, validation


def micro_batches(dataset, global_batches, args):
    """This rank's share of the first global batches, whatever the number of ranks."""
    stride = args.micro_batch_size * parallel_state.get_data_parallel_world_size()
    first = args.micro_batch_size * parallel_state.get_data_parallel_rank()
    for start in range(first, global_batches * args.global_batch_size, stride):
        samples = [dataset[i] for i in range(start, start + args.micro_batch_size)]
        yield {key: value.cuda() for key, value in torch.utils.data.default_collate(samples).items()}


def loss_func(loss_mask, token_losses):
    loss = (token_losses.float() * loss_mask).sum() / loss_mask.sum()
    # A copy, for the schedule divides the loss in place.
    return loss, loss.detach().clone()


def forward_step(data_iterator, model):
    batch = next(data_iterator)
    token_losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return token_losses, partial(loss_func, batch["loss_mask"])


def run_micro_batches(model, data_iterator, num_microbatches, args, forward_only):
    """Forward and, unless ``forward_only``, backward; returns the mean loss over micro-batches and ranks."""
    losses = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=data_iterator,
        model=model,
        num_microbatches=num_microbatches,
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        forward_only=forward_only,
    )
    mean = torch.stack(losses).mean()
    dist.all_reduce(mean, group=parallel_state.get_data_parallel_group())
    return float(mean) / parallel_state.get_data_parallel_world_size()


def evaluate(model, dataset, num_microbatches, args):
    """Loss on the first ``--eval-iters`` global batches of the validation samples, the same ones each time."""
    model.eval()
    batches = micro_batches(dataset, args.eval_iters, args)
    loss = run_micro_batches(model, batches, num_microbatches * args.eval_iters, args, forward_only=True)
    model.train()
    return loss


def main():
    args = parse_args()
    num_microbatches = initialize(args)
    training, validation = build_datasets(args)
    model = build_model(args)
    optimizer, scheduler = build_optimizer(model, args)
    config = spec_config_from_args(args)
    handle = attach(model, config)

    is_first = dist.get_rank() == 0
    paths = [args.output / "log.jsonl", args.output / METRICS_FILE]
    if is_first:
        for path in paths:
            path.unlink(missing_ok=True)
    log = JsonLines(paths[0])
    writer = MetricsWriter(paths[1] if config.metrics_interval else None)

    data_iterator = micro_batches(training, args.iterations, args)
    for iteration in range(1, args.iterations + 1):
        start = time.perf_counter()
        model.zero_grad_buffer()
        optimizer.zero_grad()
        lm_loss = run_micro_batches(model, data_iterator, num_microbatches, args, forward_only=False)
        optimizer.step()
        scheduler.step(increment=args.global_batch_size)
        values = handle.end_step()
        step_time = time.perf_counter() - start
        writer.write(iteration, values)
        values.pop("diagnostics", None)
        record = {"iteration": iteration, "lm_loss": lm_loss, **values, "step_time_s": step_time}
        if iteration % args.eval_interval == 0 or iteration == args.iterations:
            record["validation_loss"] = evaluate(model, validation, num_microbatches, args)
        if is_first:
            log.append(record)
            if iteration % 10 == 0 or "validation_loss" in record:
                shown = "  ".join(f"{name} {value:.4g}" for name, value in record.items() if name != "iteration")
                print(f"iteration {iteration}/{args.iterations}  {shown}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
