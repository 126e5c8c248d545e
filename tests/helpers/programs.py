"""The ranks of a job: training programs other than Megatron's pretraining loop, on one or two ranks.

    programs.py NAME OUTPUT.pt SIZES.json

Runs the function of that name below on ranks laid out by the sizes; rank 0 saves what it returns.
"""

import json
import sys

import torch
import torch.distributed as dist

from megatron_moe_spec.cpu import enable

enable()  # before Megatron is imported

from trainers import run, tokens_of  # noqa: E402

BOTH = dict(specialization_loss_coeff=1.0, coupling_loss_coeff=1.0)
FULL_RECOMPUTE = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)


def build(sizes: dict, **settings) -> list:
    """This rank's chunks of a model of four MoE layers, which every layout draws alike."""
    import megatron_models
    from layouts import draw_weights

    chunks = megatron_models.build_chunks(num_layers=4, **sizes, **settings)
    for chunk in chunks:
        draw_weights(chunk)
    return chunks


def wrap(chunks: list) -> list:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    config = chunks[0].config
    config.finalize_model_grads_func = finalize_model_grads
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    return [DistributedDataParallel(config, settings, chunk) for chunk in chunks]


def schedule(models: list, step, batches: list, seq_length: int, micro_batch_size=2, forward_only=False) -> list:
    """Megatron's schedule on wrapped or bare chunks; ``step``: batch, model -> output, loss function."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    many = len(models) > 1
    return get_forward_backward_func()(
        forward_step_func=lambda iterator, model: step(next(iterator), model),
        data_iterator=[iter(batches) for _ in models] if many else iter(batches),
        model=models if many else models[0],
        num_microbatches=len(batches),
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )


def mean_step(batch, model):
    return run(model, batch), lambda losses: (0.1 * losses.mean(), {"loss": losses.detach().mean()})


def gradients(chunks: list) -> dict:
    """Every parameter's whole gradient after a step under DDP, on rank 0."""
    from layouts import whole_gradients

    kept = [{n: p.detach().clone() for n, p in c.named_parameters()} for c in chunks]
    found = [{n: p.main_grad.detach().clone() for n, p in c.named_parameters() if p.requires_grad} for c in chunks]
    whole = whole_gradients(chunks, found)
    with torch.no_grad():  # which were overwritten to be put together
        for chunk, weights in zip(chunks, kept):
            for name, weight in chunk.named_parameters():
                weight.copy_(weights[name])
    return whole


def attached(chunks, config: dict):
    from megatron_moe_spec import SpecConfig, attach

    return attach(chunks, SpecConfig(**config))


def train(chunks: list, handle, step, batches, seq_length: int, micro_batch_size: int = 2) -> dict:
    """One training step: gradients and logged values."""
    wrapped = wrap(chunks)
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    schedule(wrapped, step, batches, seq_length, micro_batch_size)
    metrics = handle.end_step() if handle else {}
    return {"gradients": gradients(chunks), "metrics": metrics}


def schedule_fetched(sizes, before: bool):
    """A training loop that asks for the schedule before the losses are attached, or after."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    chunks = wrap(build(sizes))
    run_schedule = get_forward_backward_func() if before else None
    handle = attached(chunks, BOTH)
    for chunk in chunks:
        chunk.zero_grad_buffer()
    batches = tokens_of(12, 12)
    (run_schedule or get_forward_backward_func())(
        forward_step_func=lambda iterator, model: mean_step(next(iterator), model),
        data_iterator=[iter(batches) for _ in chunks] if len(chunks) > 1 else iter(batches),
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=12,
        micro_batch_size=2,
        forward_only=False,
    )
    return {"gradients": gradients([chunk.module for chunk in chunks]), "metrics": handle.end_step()}


def preference_pairs(sizes, variable=False, recompute=False, kind="mass"):
    """A frozen reference and the policy run in one step; their hidden states travel as one tensor.

    The model runs twice a step: on the preferred sequences and on the others.
    """
    settings = {**(FULL_RECOMPUTE if recompute else {}), "variable_seq_lengths": variable}
    (policy,), (reference,) = build(sizes, **settings), build(sizes, **settings)
    reference.requires_grad_(False).eval()
    reference.config = policy.config  # as bridges build them
    handle = attached([policy], {**BOTH, "coupling_type": kind})

    def step(batch, model):
        inputs = model.module.decoder.input_tensor
        halves = [{"tokens": part} for part in batch["tokens"].chunk(2)]
        parts = [None] * 4 if inputs is None else inputs.chunk(4)
        outputs = []
        for part, half, (runs, inner) in zip(parts, 2 * halves, 2 * [(reference, reference)] + 2 * [(model, policy)]):
            if part is not None:
                inner.set_input_tensor(part)
            with torch.set_grad_enabled(inner is policy):
                outputs.append(run(runs, half))

        def loss(joined):
            other_chosen, other_rejected, chosen, rejected = (x.mean() for x in joined.chunk(4))
            value = -torch.nn.functional.logsigmoid(chosen - other_chosen - rejected + other_rejected)
            return 0.1 * value, {"loss": value.detach()}

        return torch.cat(outputs), loss

    # Half the sequences of a batch travel, four times as long.
    return train([policy], handle, step, tokens_of(12, 12, size=4), 4 * 12, micro_batch_size=2)


def passes_between_steps(sizes, disturbed: bool, config=BOTH):
    """Evaluation, generation by another length, and training of another model on the same config object."""
    chunks, others = build(sizes), build(sizes)
    for other in others:
        for module in other.modules():
            if getattr(module, "config", None) is not None:
                module.config = chunks[0].config
    handle = attached(chunks, config)
    outputs, results = {}, []
    for number in range(2):
        if disturbed:
            others_gradients = train(others, None, mean_step, tokens_of(12, 12, seed=7), 12)["gradients"]
            for chunk in chunks:
                chunk.eval()
            with torch.no_grad():
                evaluated = schedule(chunks, mean_step, tokens_of(12, 12, seed=8), 12, forward_only=True)
                generated = schedule(chunks, mean_step, tokens_of(5, 5, seed=9), 5, forward_only=True)
            for chunk in chunks:
                chunk.train()
            with torch.no_grad():
                scored = schedule(chunks, mean_step, tokens_of(12, 12, seed=10), 12, forward_only=True)
            outputs = {"other": others_gradients, "forward": [evaluated, generated, scored]}
        results.append(train(chunks, handle, mean_step, tokens_of(12, 12, seed=number), 12))
    handle.detach()
    plain = train(others, None, mean_step, tokens_of(12, 12, seed=7), 12)["gradients"]
    return {"steps": results, "plain": plain, **outputs}


def metrics_alone(sizes):
    """Nothing travels with the hidden states, and pairs across stages are left out."""
    chunks = build(sizes)
    handle = attached(chunks, dict(metrics_interval=1))
    lengths = []
    for chunk in chunks:
        chunk.decoder.layers[0].register_forward_pre_hook(
            lambda module, args, kwargs: lengths.append(len(kwargs["hidden_states"])), with_kwargs=True
        )
    result = train(chunks, handle, mean_step, tokens_of(12, 12), 12)
    return {**result, "lengths": lengths}


def dynamic_lengths(sizes, config, padding):
    """Ranks of an expert group with different numbers of tokens; with padding, the last micro-batch is all padding."""
    (model,) = build(sizes, calculate_per_token_loss=True)
    handle = attached(model, config)
    batches = tokens_of(12, 5, 9, 12)
    for number, batch in enumerate(batches if padding else ()):
        batch["padding_mask"] = torch.full_like(batch["tokens"], number == 3, dtype=torch.bool)
    rank, size = dist.get_rank(), dist.get_world_size()

    def step(batch, module):
        def loss(losses):
            mask = ~batch["padding_mask"] if padding else torch.ones_like(losses, dtype=torch.bool)
            total, number = 0.1 * (losses * mask).sum(), mask.sum().int()
            return total, number, {"loss": torch.stack([total.detach(), number.float()])}

        return run(module, batch), loss

    return train([model], handle, step, batches[rank::size], 12)


def overlapped_parameter_gather(sizes, overlap: bool):
    """Weights are gathered while the model runs: a loss that reads them too early sees those of the step before."""
    import megatron_models
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    model = megatron_models.build_model(**sizes)
    model.config.finalize_model_grads_func = finalize_model_grads
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
        bucket_size=2000,
    )
    wrapped = DistributedDataParallel(model.config, settings, model, disable_bucketing=False)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=5e-2, use_distributed_optimizer=True, overlap_param_gather=overlap),
        [wrapped],
    )
    model.config.no_sync_func = wrapped.no_sync if overlap else None
    handle, values = attached([wrapped], dict(erc_loss_coeff=1.0)), []
    for number in range(3):
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        batches = megatron_models.micro_batches(4, seed=number)[dist.get_rank() :: 2]
        schedule([wrapped], mean_step, batches, 12)
        optimizer.step()
        values.append(handle.end_step()["erc_loss"])
    return values


def sharded_weights(sizes, strategy, config, **settings):
    """Megatron-FSDP on two ranks, or (None) DDP; with a loss per token, for gloo knows no division in a reduction."""
    (model,) = build(sizes, calculate_per_token_loss=True, **settings)
    batches = tokens_of(12, 12, 12, 12)[dist.get_rank() :: dist.get_world_size()]

    def step(batch, module):
        def loss(losses):
            return 0.1 * losses.sum(), torch.tensor(losses.numel(), dtype=torch.int), {"loss": losses.detach().mean()}

        return run(module, batch), loss

    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    wrapped = _wrap_by_fsdp(model, strategy) if strategy else wrap([model])[0]
    handle = attached([wrapped], config)
    wrapped.zero_grad_buffer()
    schedule([wrapped], step, batches, 12)
    whole = {}
    for name, weight in wrapped.named_parameters():
        name = name.replace("module.", "")
        whole[name] = _whole(weight.grad, shapes[name]) if strategy else weight.main_grad.clone()
    return {"gradients": whole, "metrics": handle.end_step()}


def _wrap_by_fsdp(model, strategy: str):
    import os

    from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel

    os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)  # which it refuses
    model.config.finalize_model_grads_func = finalize_model_grads
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
        use_distributed_optimizer=True,
        use_megatron_fsdp=True,
        data_parallel_sharding_strategy=strategy,
    )
    return FullyShardedDataParallel(model.config, settings, model)


def _whole(gradient, shape):
    """A gradient of which every rank has a part; on all ranks."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, None if gradient is None else gradient.to_local().detach().flatten())
    return torch.cat([part for part in parts if part is not None]).view(shape)


def errors(sizes):
    """Messages of refusals on two ranks; None where there is none."""
    from megatron_moe_spec import SpecConfig, attach

    def message(function, *args, **kwargs):
        try:
            function(*args, **kwargs)
        except (ValueError, RuntimeError) as error:
            return str(error)

    found = {}
    if sizes.get("pipeline_model_parallel_size") == 2:
        (chunk,) = build(sizes)
        config = SpecConfig(coupling_loss_coeff=1.0 + dist.get_rank())
        found["other config"] = message(attach, chunk, config)
        handle = attached(chunk, BOTH)
        chunk.set_input_tensor(None if chunk.pre_process else torch.randn(12, 2, 16))
        found["outside of the schedule"] = message(run, chunk, tokens_of(12)[0])
        handle.detach()
    else:
        (model,) = build(sizes, sequence_parallel=True)
        for name in ("tensor_model_parallel_size", "expert_tensor_parallel_size"):
            setattr(model.config, name, 1)
        for name in ("orthogonality", "specialization"):
            config = SpecConfig(**{f"{name}_loss_coeff": 1.0})
            found[name] = message(lambda config=config: attach(model, config).detach())
    return found


def one_rank_holds_the_model(sizes):
    from megatron_moe_spec import SpecConfig, attach

    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    if dist.get_rank() > 0:
        return None
    (model,) = build(sizes)
    handle = attach(model, SpecConfig(coupling_loss_coeff=1.0), group=groups[0])
    run(model, tokens_of(12)[0]).mean().backward()
    return handle.end_step()


def main(name: str, output: str, job: str) -> None:
    import megatron_models

    sizes, cases = json.loads(job)
    megatron_models.initialize_ranks(sizes)
    results = [globals()[name](sizes, **case) for case in cases]
    if dist.get_rank() == 0:
        torch.save(results, output)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
