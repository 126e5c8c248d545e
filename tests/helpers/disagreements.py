"""The ranks of a job that do not agree: one has loaded weights, has padding, refuses, has failed.

    disagreements.py NAME OUTPUT SETTINGS.json

Runs the function of that name below; each rank saves what it returns as OUTPUT.rank.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_moe_spec.cpu import enable

enable()  # before Megatron is imported

BOTH = dict(specialization_loss_coeff=1.0, coupling_loss_coeff=1.0)


def _attached(settings: dict, **config):
    import megatron_models
    from layouts import draw_weights

    from megatron_moe_spec import SpecConfig, attach

    model = megatron_models.build_model(**settings)
    draw_weights(model)
    return model, attach(model, SpecConfig(**{**BOTH, **config}))


def _raised(function):
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def weights_loaded_on_one_rank(sizes: dict, dispatcher: dict, loads: bool, reorders: bool = False):
    """Gradients of a step after a first one; or the error, where the library then hands over rows in another order."""
    import deep_ep_on_gloo
    import megatron_models

    model, handle = _attached({**sizes, **dispatcher})

    def step():
        return megatron_models.train_step(model, megatron_models.micro_batches(1))

    step()
    handle.end_step()
    if loads and dist.get_rank() == 0:
        model.load_state_dict(model.state_dict())
    deep_ep_on_gloo.Order.reversed = reorders
    return _raised(step) if reorders else (step(), handle.end_step())


def padding_on_one_rank(sizes: dict, everywhere: bool):
    """Each rank has its half of the sequences, and the padding lies in rank 0's."""
    import megatron_models as mm

    model, handle = _attached(sizes)
    tokens = mm.micro_batches(1)[0]["tokens"]
    positions = torch.arange(mm.SEQUENCE).expand_as(tokens)
    mask = positions >= mm.SEQUENCE - 2
    tokens, positions, labels, mask = map(mm.on_this_rank, (tokens, positions, tokens.roll(-1, 1), mask))
    extra = {"padding_mask": mask} if everywhere or mask.any() else {}
    (0.0 * model(tokens, positions, None, labels=labels, **extra).mean()).backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return gradients, handle.end_step(), bool(mask.any()), "padding_mask" in extra


def refused_on_one_rank(sizes: dict, where: str):
    import megatron_models

    from megatron_moe_spec import SpecConfig, attach

    rank = dist.get_rank()
    model = megatron_models.build_chunks(num_layers=4, **sizes)
    folder = Path(f"{sys.argv[2]} traces")
    if where == "model" and rank == 0:
        model[0].config.transformer_impl = "inference_optimized"
    if where == "modules" and rank == 0:
        model.append(model[0])
    if where == "folder" and rank == 0:
        (folder / "router_trace_rank0.jsonl").mkdir(parents=True)
    error = _raised(lambda: attach(model, SpecConfig(trace_path=str(folder), **BOTH)))
    hooked = [name for layer in model[0].modules() for name in vars(layer) if name == "routing"]
    return error, hooked


def model_on_one_rank():
    """Rank 1 holds none, and has left."""
    return _raised(lambda: _attached({})) if dist.get_rank() == 0 else None


def micro_batches_on_one_rank():
    """A measured step, in which rank 0 has seen one micro-batch more than those that it shares them with."""
    from megatron_moe_spec import SpecConfig
    from megatron_moe_spec.integration.step.clock import StepClock
    from megatron_moe_spec.integration.step.diagnostics import StepDiagnostics
    from megatron_moe_spec.integration.step.losses import StepLosses

    group, config = dist.group.WORLD, SpecConfig(metrics_interval=1)
    clock = StepClock(config)
    diagnostics = StepDiagnostics(config, clock, [0, 1], num_experts=4, top_k=1, tp_cp_group=group, groups=[group])
    active_TE = torch.tensor([[True, True, False, False]])
    for _ in range(2 if dist.get_rank() == 0 else 1):
        diagnostics.measure_routing(0, active_TE / 2.0, active_TE, 1)
    diagnostics.measure_routing(1, active_TE / 2.0, active_TE, 1)
    _, measures = diagnostics.reduce(StepLosses(config, clock, [0, 1], group, [group]))
    return [layer["max_violation_micro_batch"] for layer in measures["layers"]]


def step_that_failed_on_one_rank(sizes: dict):
    """Rank 0's forward ends in its second layer; each rank's values, and those of the other's micro-batch alone."""
    import megatron_models as mm

    model, handle = _attached(sizes, metrics_interval=1)
    batch = mm.micro_batches(2)[dist.get_rank()]

    def fail(*args):
        raise MemoryError("out of memory")

    hook = model.decoder.layers[1].register_forward_pre_hook(fail) if dist.get_rank() == 0 else None
    error = _raised(lambda: mm.run_model(model, batch).mean().backward())
    values = handle.end_step()
    if hook is not None:
        hook.remove()
    if dist.get_rank() == 1:
        mm.run_model(model, batch).mean().backward()
    alone = handle.end_step()
    return error, values, alone


def main(name: str, output: str, settings: str) -> None:
    from deep_ep_on_gloo import use_deep_ep

    use_deep_ep()
    import megatron_models

    settings = json.loads(settings)
    megatron_models.initialize_ranks(settings.get("sizes", {}))
    torch.save(globals()[name](**settings), f"{output}.{dist.get_rank()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
