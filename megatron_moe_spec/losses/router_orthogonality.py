"""Router orthogonality: the rows of a router's weight, one an expert, should point in different directions.

Two losses of this kind train large models: ERNIE 4.5's (squared; ``moe_orthogonal_loss_lambda`` is 1e-2 in its released
configuration, and its released code takes the mean over the E x E entries) and SimBal's (absolute; arXiv 2506.14038).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megatron_moe_spec.losses.base import RouterWeightLoss, option
from megatron_moe_spec.losses.scores import accumulation_dtype, check_floating
from megatron_moe_spec.losses.vectors import unit_vectors


@dataclass(frozen=True)
class RouterOrthogonality(RouterWeightLoss):
    """See ``router_orthogonality_loss``."""

    name: ClassVar[str] = "router_orthogonality_loss"

    coeff: float = option(
        0.0,
        "--moe-router-orthogonality-loss-coeff",
        "Weight of the router orthogonality loss: by how much the rows of a router's weight are not orthogonal, summed "
        "over MoE layers.",
        paper="1e-2 (squared), 0.1 (absolute)",
    )
    kind: str = option(
        "squared",
        "--moe-router-orthogonality-type",
        "squared: the mean squared cosine of two rows (ERNIE 4.5). absolute: the sum of the absolute entries of "
        "W W^T - I, which makes the rows' lengths 1 as well (SimBal, arXiv 2506.14038).",
        choices=("squared", "absolute"),
    )

    def of_weight(self, router_weight_EH: Tensor) -> Tensor:
        return router_orthogonality_loss(router_weight_EH, self.kind)


def router_orthogonality_loss(router_weight: Tensor, kind: str = "squared") -> Tensor:
    """Distance of the rows of a router's weight W from being orthogonal; 0 for orthonormal rows.

        squared:  L = mean over the E x E entries of (V V^T - I)^2, V the rows of W at length 1
        absolute: L = sum over the E x E entries of |W W^T - I|

    Args:
        router_weight: [E, H] W, one row an expert. With squared, a zero row is orthogonal to all, and adds 1 / E^2.
        kind: squared or absolute.

    Returns:
        Scalar in fp32 (fp64 for fp64 input).

    Raises:
        ValueError: a shape, dtype or option does not fit; the message names the argument.
    """
    check_floating("router_weight", router_weight, "[E, H]")
    identity = torch.eye(len(router_weight), dtype=accumulation_dtype(router_weight), device=router_weight.device)
    if kind == "squared":
        rows = unit_vectors(router_weight.unsqueeze(0))[0].squeeze(0)
        return (rows @ rows.T - identity).square().mean()
    if kind == "absolute":
        rows = router_weight.to(identity.dtype)
        return (rows @ rows.T - identity).abs().sum()
    raise ValueError(f"kind must be squared or absolute; got {kind!r}")
