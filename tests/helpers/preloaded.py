"""What the processes of ``forks.py`` are forked with: imports that take seconds, and nothing that is initialized."""

import gc
import importlib

from interpreter import remember_builtins
from processes import HAS_MEGATRON, HAS_TRAINING_LOOP

remember_builtins()
modules = ["megatron_moe_spec.launch", "torch.distributed.checkpoint", "torch.utils.tensorboard"]
if HAS_MEGATRON:
    # Megatron looks for both when it is imported.
    from deep_ep_on_gloo import use_deep_ep

    from megatron_moe_spec.cpu import enable

    enable()
    use_deep_ep()
    modules += ["megatron_models", "trainers", "grouped_linear", "partial_graphs"]
    modules += ["megatron_moe_spec.integration.attach", "megatron.core.dist_checkpointing", "megatron.core.optimizer"]
if HAS_TRAINING_LOOP:
    modules += ["megatron.training", "megatron_moe_spec.integration.training"]
for module in modules:
    importlib.import_module(module)

# The collector would write to the pages of all these objects, and so take them from what the processes share.
gc.collect()
gc.freeze()
