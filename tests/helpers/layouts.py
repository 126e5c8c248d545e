"""The ranks of a job: one training step of each of several small models in one parallel layout.

    layouts.py JOB.json OUTPUT.pt

The job holds the sizes of the parallel groups and the cases. Written for each case: every parameter's whole gradient
by its checkpoint key, and the logged values. Weights are drawn by checkpoint key too, so that every layout trains the
same model.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

from megatron_moe_spec.cpu import enable

GLOBAL_BATCH = 4  # micro-batches


def shards(model):
    """(key, tensor, shape of the whole, place in it, is this its main replica) for every sharded tensor."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica

    def walk(entry):
        if isinstance(entry, ShardedTensor):
            yield entry
        elif isinstance(entry, ShardedTensorFactory):
            yield from walk(entry.build())
        elif isinstance(entry, (dict, list, tuple)):
            for child in entry.values() if isinstance(entry, dict) else entry:
                yield from walk(child)

    for tensor in walk(model.sharded_state_dict()):
        if isinstance(tensor.data, torch.Tensor) and tensor.data.is_floating_point():
            sizes = [1] * tensor.prepend_axis_num + list(tensor.local_shape)
            place = tuple(slice(start, start + size) for start, size in zip(tensor.global_offset, sizes))
            yield tensor.key, tensor.data, tuple(tensor.global_shape), place, is_main_replica(tensor.replica_id)


def draw_weights(model) -> None:
    with torch.no_grad():
        for key, weight, shape, place, _ in shards(model):
            seed = int(hashlib.md5(key.encode()).hexdigest()[:8], 16)
            whole = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            scale = 1.0 if "router" in key or "expert_bias" in key else 0.2
            weight.copy_(1.0 if "norm" in key else whole[place].reshape(weight.shape) * scale)


def whole_gradients(chunks: list, gradients: list[dict]) -> dict:
    """Every parameter's gradient, put together from all ranks' main replicas; on rank 0, elsewhere none."""
    parts = []
    for chunk, found in zip(chunks, gradients, strict=True):
        parameters = dict(chunk.named_parameters())
        with torch.no_grad():
            for name, gradient in found.items():
                parameters[name].copy_(gradient)
        parts += [
            (key, x.detach().clone(), shape, place)
            for key, x, shape, place, main in shards(chunk)
            if main and "expert_bias" not in key
        ]
    gathered = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(parts, gathered)
    whole = {}
    for key, part, shape, place in sum(gathered or [], []):
        target = whole.setdefault(key, torch.full(shape, float("nan")))
        target[place] = part.reshape(target[place].shape)
    assert not any(x.isnan().any() for x in whole.values()), "a part of a gradient is missing"
    return whole


def build_chunks(pattern, settings: dict) -> list:
    """This rank's chunks of a GPT, or of a HybridModel of a pattern in as many segments as the layout has stages."""
    if pattern is None:
        import megatron_models

        return megatron_models.build_chunks(**{"num_layers": 4, **settings})
    import hybrid_models

    ranks, chunks = (settings.get(f"{kind}_model_parallel_size") or 1 for kind in ("pipeline", "virtual_pipeline"))
    return hybrid_models.build_chunks(hybrid_models.of_stages(pattern, ranks * chunks), **settings)


@contextmanager
def gradients_of_the_swiglu(kernels: str) -> Iterator[set]:
    """Names of the functions that compute one meanwhile, of those that add the loss's."""
    seen = set()
    with ExitStack() as patches:
        for name in ("swiglu_gradient", "swiglu_gradient_of_sum") if kernels == "triton" else ():
            from megatron_moe_spec.kernels import swiglu

            function = getattr(swiglu, name)

            def noting(*inputs, name=name, function=function):
                seen.add(name)
                return function(*inputs)

            patches.enter_context(patch.object(swiglu, name, noting))
        yield seen


def run(sizes: dict, case: dict) -> dict:
    import megatron_models
    from megatron.core import parallel_state
    from other_losses import losses_of_ones_own
    from partial_graphs import capture, graph_settings

    from megatron_moe_spec import SpecConfig, attach

    settings = dict(sequence_parallel=sizes.get("tensor_model_parallel_size", 1) > 1, **sizes)
    settings.update(case["model"])
    settings.update(graph_settings(case.get("graphs", [])))
    if case["bf16"]:
        settings.update(bf16=True, params_dtype=torch.bfloat16)
    chunks = build_chunks(case.get("pattern"), settings)
    for chunk in chunks:
        draw_weights(chunk)
    if case["pads_rows"]:
        from row_padding import pad_rows

        pad_rows(chunks, case["pads_rows"])
    own = losses_of_ones_own(case["own"]) if case["own"] is not None else ()
    trace = dict(trace_path=case["trace"], trace_interval=1) if case.get("trace") else {}
    handle = attach(chunks, SpecConfig(extra_losses=own, **trace, **case["config"]))
    if case.get("graphs"):
        for chunk in chunks:
            capture(chunk)
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    batches = megatron_models.micro_batches(GLOBAL_BATCH, padding=case["padding"])
    if case["one_sequence"]:
        batches = [{name: x[i : i + 1] for name, x in b.items()} for b in batches for i in range(len(b["tokens"]))]
    batches = batches[rank::size]
    # With a token stride, the mean over all of its starts.
    steps = range(case["config"]["specialization_token_stride"])
    gradients, metrics = [], []
    with gradients_of_the_swiglu(case["config"]["kernels"]) as of_swiglu:
        for step in steps:
            handle.start_after(step)
            gradients.append(megatron_models.train_chunks(chunks, batches, main_loss_weight=0.1))
            metrics.append(handle.end_step())
    handle.detach()  # the trace is written
    mean = [
        {name: sum(step[chunk][name] for step in gradients) / len(steps) for name in gradients[0][chunk]}
        for chunk in range(len(chunks))
    ]
    losses = {name: sum(m[name] for m in metrics) / len(steps) for name in metrics[0] if name != "diagnostics"}
    return {
        "gradients": whole_gradients(chunks, mean),
        "losses": losses,
        "diagnostics": metrics[0].get("diagnostics"),
        "gradients of the SwiGLU": of_swiglu,  # on this rank
        "trace": read_whole_trace(case["trace"]) if trace else None,
    }


def read_whole_trace(folder: str):
    """(layers, rows of all tokens in an order that depends on them alone), of all ranks' files."""
    from megatron_moe_spec.traces.files import read_trace

    dist.barrier()
    trace = read_trace(folder)
    rows = sorted(map(tuple, trace.experts_TMK.flatten(1).tolist()))
    return trace.layers, trace.num_padding, rows


def main(job: str, output: str) -> None:
    enable()
    from deep_ep_on_gloo import use_deep_ep

    use_deep_ep()
    from grouped_linear import use_torch_grouped_linear

    use_torch_grouped_linear()
    import megatron_models

    sizes, cases = json.loads(Path(job).read_text())
    megatron_models.initialize_ranks(sizes)
    results = [run(sizes, case) for case in cases]
    if dist.get_rank() == 0:
        torch.save(results, output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
