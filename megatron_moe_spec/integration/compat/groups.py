"""Process groups of a model, and of its MoE layers."""

from torch import nn
from torch.distributed import ProcessGroup

from megatron_moe_spec.integration.compat.models import router_of, stage_module
from megatron_moe_spec.integration.compat.protocols import MoELayer, ProcessGroupCollection, TokenDispatcher


def process_groups(chunk: nn.Module) -> ProcessGroupCollection:
    """A model's own ProcessGroupCollection, or that of the job."""
    groups = getattr(stage_module(chunk), "pg_collection", None)
    if groups is None:
        from megatron.core.process_groups_config import ProcessGroupCollection as Collection

        groups = Collection.use_mpu_process_groups(["tp", "cp", "pp", "tp_dp_cp"])
    return groups


def model_ranks(chunk: nn.Module) -> list[ProcessGroup]:
    """Groups by which a sum over one, then over the next, is a sum over all ranks that hold the model."""
    groups = process_groups(chunk)
    found = [getattr(groups, name, None) for name in ("tp_dp_cp", "pp")]
    if found[0] is None:
        # Ranks that keep shards of one weight (GTP) have other tokens, and are not all of dp_cp.
        data = "dp_cp_gtp_remat" if hasattr(groups, "dp_cp_gtp_remat") else "dp_cp"
        found[:1] = [getattr(groups, name, None) for name in ("tp", data)]
    return [group for group in found if group is not None]


def sequence_ranks(chunk: nn.Module) -> int:
    """Number of ranks that a sequence is divided over between layers."""
    groups = process_groups(chunk)
    return groups.cp.size() * (groups.tp.size() if stage_module(chunk).config.sequence_parallel else 1)


def tp_cp_group(moe_layer: MoELayer) -> ProcessGroup:
    """The ranks among which a micro-batch's tokens are divided: tensor (sequence) x context parallel."""
    return router_of(moe_layer).tp_cp_group


def etp_group(dispatcher: TokenDispatcher) -> ProcessGroup:
    """The ranks over which the columns of an expert's activations are divided: expert tensor parallel."""
    return dispatcher.tp_group


def etp_ep_group(dispatcher: TokenDispatcher) -> ProcessGroup:
    """The ranks that hold the parts of one set of experts: expert x expert tensor parallel."""
    return dispatcher.tp_ep_group
