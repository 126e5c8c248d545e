"""A short bf16 training run of a small MoE GPT on Megatron-Core, without and with the losses, from the same weights.

    python benchmarks/train.py [--iterations 200] [--output FOLDER] [--smoke]

The text is a noisy order-2 sequence that the model can learn. Exit status 1 where a value is not finite, where the
losses that are trained do not fall below the baseline's, or where the model stops learning.
"""

import argparse
import math
import os
import statistics
import sys
import time
from pathlib import Path

if "--smoke" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import moe
import torch
from common import RESULTS, Results
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_moe_spec import SpecConfig, attach

VOCABULARY = 256
# Ten times the paper's coefficients, for the few tokens of this run.
LOSSES = dict(specialization_loss_coeff=2e-2, coupling_loss_coeff=1e-2)
# hidden size, layers, expert size, experts, top-k, sequence, sequences
SIZES, SMOKE_SIZES = (512, 4, 512, 16, 4, 512, 16), (16, 2, 24, 4, 2, 8, 2)


def build(sizes):
    hidden, layers, ffn, experts, top_k, sequence, _ = sizes
    model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)
    config = moe.model_config(
        layers,
        hidden,
        ffn,
        experts,
        top_k,
        num_attention_heads=max(hidden // 64, 1),
        masked_softmax_fusion=False,
        normalization="RMSNorm",
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
    model = GPTModel(
        config,
        get_gpt_decoder_block_spec(config, use_transformer_engine=moe.HAS_TRANSFORMER_ENGINE, normalization="RMSNorm"),
        vocab_size=VOCABULARY,
        max_sequence_length=sequence,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    ).cuda()
    # Data-parallel settings that keep bf16 gradients in fp32.
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False)
    model = DistributedDataParallel(config, ddp, model)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=1e-3, weight_decay=0.01, clip_grad=1.0, bf16=config.bf16, params_dtype=moe.DTYPE
        ),
        [model],
    )
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    return model, optimizer


def batches(sizes):
    """Tokens in which one follows from the two before, but for one in ten."""
    *_, sequence, number = sizes
    generator = torch.Generator().manual_seed(0)
    while True:
        tokens = torch.randint(VOCABULARY, (number, sequence + 1), generator=generator)
        noise = torch.rand(number, sequence + 1, generator=generator) < 0.1
        for i in range(2, sequence + 1):
            following = (3 * tokens[:, i - 1] + tokens[:, i - 2] % 4 + 1) % VOCABULARY
            tokens[:, i] = torch.where(noise[:, i], tokens[:, i], following)
        yield tokens.cuda()


def train(sizes, fields: dict, iterations: int):
    """Yields the values of each iteration."""
    model, optimizer = build(sizes)
    # The baseline's losses are measured in each step, which takes time: do not compare the times of the two.
    handle = attach(model, SpecConfig(kernels="triton", **fields) if fields else SpecConfig(metrics_interval=1))
    *_, sequence, number = sizes

    def forward_step(iterator, module):
        tokens = next(iterator)
        positions = torch.arange(sequence, device=tokens.device).expand(number, -1)
        output = module(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous())

        def loss(losses):
            mean = losses.float().mean()
            return mean, mean.detach().clone()

        return output, loss

    iterator = batches(sizes)
    for iteration in range(1, iterations + 1):
        start = time.perf_counter()
        model.zero_grad_buffer()
        optimizer.zero_grad()
        (lm_loss,) = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterator,
            model=model,
            num_microbatches=1,
            seq_length=sequence,
            micro_batch_size=number,
            forward_only=False,
        )
        optimizer.step()
        values = {"lm_loss": float(lm_loss), **handle.end_step()}
        values.pop("diagnostics", None)
        yield {"iteration": iteration, **values, "ms": 1e3 * (time.perf_counter() - start)}
    handle.detach()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, on CPU in Triton's interpreter")
    arguments = parser.parse_args()
    moe.initialize()
    sizes = SMOKE_SIZES if arguments.smoke else SIZES
    results, ends = Results(arguments.output, "train"), {}
    for name, fields in {"baseline": {}, "with the losses": LOSSES}.items():
        run = []
        for row in train(sizes, fields, arguments.iterations):
            run.append(row)
            results.add({"run": name, **row}, show=False)
        last = run[-max(len(run) // 10, 1) :]
        ends[name] = {key: statistics.mean(row[key] for row in last) for key in run[0] if key != "iteration"}
        print(name, "  ".join(f"{key} {value:.4g}" for key, value in ends[name].items()), flush=True)
        results.facts["means_of_the_last_tenth"] = ends
        results.save()
    torch.distributed.destroy_process_group()
    finite = all(math.isfinite(value) for row in results.rows for value in row.values() if not isinstance(value, str))
    before, after = ends["baseline"], ends["with the losses"]
    lower = all(after[name] < before[name] for name in ("specialization_loss", "coupling_loss"))
    learns = after["lm_loss"] < math.log(VOCABULARY)
    if not (finite and (arguments.smoke or (lower and learns))):
        print(f"WRONG: finite {finite}, losses below the baseline's {lower}, model learns {learns}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
