"""What is computed with the rows of each token, by the Triton kernels (``fused``) or in eager PyTorch.

Suffixes: as in ``token_rows``.
"""

from functools import partial
from typing import Optional, Union

from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_moe_spec.losses.vectors import mixed, pair_cosines, unit_vectors
from megatron_moe_spec.parallel.collectives import all_reduce_max, all_reduce_sum

Weight = tuple[Union[Tensor, float], float]  # two factors: a number, or a tensor of one element, and a number


def compare(
    rows_PD: Tensor, rows_TK: Tensor, group: ProcessGroup, fused: bool
) -> tuple[Tensor, Tensor, Optional[Tensor]]:
    """Compares the rows of each token; the columns are divided over the ranks of ``group``.

    Returns:
        Cosines [T, K, K], inverse lengths [T, K], None. Of the kernels, where the columns are on one rank: packed
        cosines [T, N], inverse lengths, terms of the sum of the squared cosines of ordered pairs.
    """
    if not fused:
        maximum, total = partial(all_reduce_max, group=group), partial(all_reduce_sum, group=group)
        units_TKD, inverse_lengths_TK = unit_vectors(_vectors(rows_PD, rows_TK), rows_TK >= 0, maximum, total)
        return all_reduce_sum(pair_cosines(units_TKD), group), inverse_lengths_TK, None
    from megatron_moe_spec.kernels import cosines as kernels  # imports triton

    if group.size() == 1:
        return kernels.row_cosines(rows_PD, rows_TK)
    products_TKK, units_TK = kernels.row_products(rows_PD, rows_TK)
    common_TK = all_reduce_max(units_TK, group)
    products_TKK = all_reduce_sum(kernels.in_units(products_TKK, units_TK, common_TK), group)
    return *kernels.cosines_from_products(products_TKK, common_TK), None


def add_gradient(
    rows_PD: Tensor,
    rows_TK: Tensor,
    used_P: Tensor,
    pairs: Tensor,
    inverse_lengths_TK: Tensor,
    weight: Weight,
    incoming_PD: Optional[Tensor],
    fused: bool,
) -> Tensor:
    """[P, D] incoming (None: 0) + weight * the gradient with respect to the rows, in their dtype.

    Args:
        pairs: mixing matrices [T, K, K], see ``losses.vectors.mixing_of``; or, for the kernels, packed cosines [T, N],
            whose sum of squares over ordered pairs is differentiated.
    """
    if fused:
        from megatron_moe_spec.kernels import cosines as kernels  # imports triton

        add = kernels.add_squares_gradient if pairs.dim() == 2 else kernels.add_mixed
        return add(rows_PD, rows_TK, used_P, pairs, inverse_lengths_TK, weight[0], incoming_PD, weight[1])
    units_TKD = _vectors(rows_PD, rows_TK).to(inverse_lengths_TK.dtype) * inverse_lengths_TK.unsqueeze(-1)
    gradient_TKD = mixed(pairs, units_TKD, inverse_lengths_TK) * (weight[0] * weight[1])
    gradient_PD = gradient_TKD.new_zeros(rows_PD.shape)
    if len(gradient_PD):
        # Vectors that are not there add their zero gradient to row 0; every other row has one token.
        gradient_PD.index_add_(0, rows_TK.clamp_min(0).view(-1), gradient_TKD.flatten(0, 1))
    gradient_PD = gradient_PD.to(rows_PD.dtype)
    return gradient_PD if incoming_PD is None else incoming_PD + gradient_PD


def _vectors(rows_PD: Tensor, rows_TK: Tensor) -> Tensor:
    """[T, K, D] each token's rows; any row where a token has none."""
    if len(rows_PD):
        return rows_PD[rows_TK]
    return rows_PD.new_zeros(*rows_TK.shape, rows_PD.shape[-1])
