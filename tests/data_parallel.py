"""Under torchrun: gradients and logged values of a data-parallel job, saved by rank 0 to the given file."""

import sys

import torch

from megatron_moe_spec.cpu import enable

if __name__ == "__main__":
    enable()
    import megatron_models
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_moe_spec import SpecConfig, attach

    output, per_token, stride = sys.argv[1], sys.argv[2] == "per-token", int(sys.argv[3])
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()

    batches = megatron_models.micro_batches(4, padding=per_token)
    model = megatron_models.build_model(calculate_per_token_loss=per_token)
    config = SpecConfig(
        specialization_loss_coeff=1.0,
        specialization_token_stride=stride,
        coupling_loss_coeff=1.0,
        metrics_interval=1,
    )
    handle = attach(model, config)
    gradients = megatron_models.train_step(model, batches[rank::size], main_loss_weight=0.01)
    metrics = handle.metrics()
    if rank == 0:
        torch.save({"gradients": gradients, "metrics": metrics}, output)
    torch.distributed.destroy_process_group()
