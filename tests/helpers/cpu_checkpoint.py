"""The ranks of a job: a run resumed from a checkpoint equals the uninterrupted one, with the distributed optimizer.

The folder of the checkpoint is the only argument.
"""

import sys

import torch

from megatron_moe_spec.cpu import enable

# The save's worker processes import this file again, without the backend.
if __name__ == "__main__":
    enable()
    import megatron_models
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    class Run:
        """A model under DDP and its optimizer."""

        def __init__(self, seed):
            self.model = megatron_models.build_model(seed)
            self.model.config.finalize_model_grads_func = finalize_model_grads
            ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
            self.wrapped = DistributedDataParallel(self.model.config, ddp, self.model)
            optimizer = OptimizerConfig(optimizer="adam", lr=1e-2, use_distributed_optimizer=True)
            self.optimizer = get_megatron_optimizer(optimizer, [self.wrapped])

        def step(self, seed):
            rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()

            def forward_step(iterator, module):
                return megatron_models.run_model(module, next(iterator)), lambda loss: (loss.mean(), {})

            batches = megatron_models.micro_batches(2 * size, seed=seed)[rank::size]
            self.wrapped.zero_grad_buffer()
            self.optimizer.zero_grad()
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iter(batches),
                model=self.wrapped,
                num_microbatches=len(batches),
                seq_length=megatron_models.SEQUENCE,
                micro_batch_size=megatron_models.MICRO_BATCH,
                forward_only=False,
            )
            assert self.optimizer.step()[0]

        def state(self, is_loading):
            # What Megatron's training loop asks for by default.
            metadata = {"distrib_optim_sharding_type": "dp_reshardable"}
            model = self.model.sharded_state_dict(metadata=metadata)
            optimizer = self.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
            return {"model": model, "optimizer": optimizer}

        def load(self, folder):
            state = dist_checkpointing.load(self.state(is_loading=True), folder)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)

    uninterrupted = Run(seed=0)
    for step in (1, 2):
        uninterrupted.step(step)
    dist_checkpointing.save(uninterrupted.state(is_loading=False), sys.argv[1])
    for step in (3, 4):
        uninterrupted.step(step)

    resumed = Run(seed=5)
    resumed.load(sys.argv[1])
    for step in (3, 4):
        resumed.step(step)
    expected = dict(uninterrupted.model.named_parameters())
    for name, weight in resumed.model.named_parameters():
        assert torch.equal(weight, expected[name]), name
    torch.distributed.destroy_process_group()
