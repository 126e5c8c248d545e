"""Expert-router coupling loss, ERC (arXiv 2512.23447): a router row's own expert should answer it the loudest."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import isfinite
from typing import ClassVar, Optional

import torch
from torch import Tensor

from megatron_moe_spec.losses.base import EXPERT_WEIGHTS, Loss, ModelSettings, option
from megatron_moe_spec.losses.scores import accumulation_dtype, check_floating


@dataclass(frozen=True)
class ExpertRouterCoupling(Loss):
    """See ``expert_router_coupling_loss``. Its arithmetic across ranks is that of its tap."""

    name: ClassVar[str] = "erc_loss"
    reads: ClassVar[str] = EXPERT_WEIGHTS
    title = "ERC"

    coeff: float = option(
        0.0,
        "--moe-erc-loss-coeff",
        "Weight of the expert-router coupling loss, ERC (arXiv 2512.23447): by how much a router row, taken as a "
        "token, excites other experts more than its own, summed over MoE layers.",
        paper="1",
    )
    alpha: float = option(
        1.0,
        "--moe-erc-alpha",
        "ERC: the share of a router row's norm in its own expert that its norm in another expert may reach.",
        paper="1",
    )

    def problems(self, transformer_config: ModelSettings) -> Iterator[str]:
        if transformer_config.num_moe_experts < 2:
            yield f"ERC compares experts (--num-experts is {transformer_config.num_moe_experts}; set it to 2 or more)"
        if not transformer_config.gated_linear_unit:
            yield (
                f"ERC is a loss of the experts' gates, which these experts lack (add --swiglu, or set {self.flag} to 0)"
            )
        if getattr(transformer_config, "moe_latent_size", None):
            yield "ERC feeds router rows to the experts, which read another width here (remove --moe-latent-size)"


def expert_router_coupling_loss(
    router_weight: Tensor, gate_weight: Tensor, alpha: float = 1.0, noise: Optional[Tensor] = None
) -> Tensor:
    """By how much a router row, taken as a token, excites another expert, or another row its expert, more than its own.

        M_ij = || (R_i * d_i) W_j^T ||_2
        L = 1 / E^2 * sum_i sum_{j != i} [ max(M_ij - alpha M_ii, 0) + max(M_ji - alpha M_ii, 0) ]        >= 0

    Its cost does not depend on the number of tokens.

    Args:
        router_weight: [E, H] R, one row an expert.
        gate_weight: [E, F, H] W, the rows of each expert's first linear layer that make its gate.
        alpha: the share of M_ii that no other entry of row and column i may exceed.
        noise: [E, H] d, taken as constant; see ``router_noise``. Default: none, as if all 1.

    Returns:
        Scalar in fp32 (fp64 for fp64 input).

    Raises:
        ValueError: a shape, dtype or option does not fit, or E < 2; the message names the argument.
    """
    _check_router(router_weight)
    if (
        gate_weight.dim() != 3
        or not gate_weight.is_floating_point()
        or (gate_weight.shape[0], gate_weight.shape[2]) != tuple(router_weight.shape)
    ):
        raise ValueError(
            "gate_weight must be a floating-point tensor [E, F, H] that fits router_weight "
            f"{list(router_weight.shape)}; got {gate_weight.dtype} {list(gate_weight.shape)}"
        )
    if not (isfinite(alpha) and alpha >= 0):
        raise ValueError(f"alpha must be finite and not negative; got {alpha}")
    if noise is not None and (noise.shape != router_weight.shape or not noise.is_floating_point()):
        raise ValueError(f"noise must be a floating-point tensor {list(router_weight.shape)}; got {list(noise.shape)}")
    return excess(proxy_norms(proxy_tokens(router_weight, noise), gate_weight), alpha)


def router_noise(router_weight: Tensor, seed: int) -> Tensor:
    """Factors d_i ~ U(1 - eps_i, 1 + eps_i)^H that leave each R_i * d_i nearest to its own row of the router.

    eps_i = min_{j != i} ||R_i - R_j|| / (2 ||R_i||), which keeps ||R_i * d_i - R_i|| within half the distance to the
    next row; 0 where R_i is 0. The same seed gives the same factors; no other random number is drawn.

    Args:
        router_weight: [E, H] R.
        seed: of the factors.

    Returns:
        [E, H] in fp32 (fp64 for fp64 input), without gradient.

    Raises:
        ValueError: a shape or dtype does not fit, or E < 2.
    """
    _check_router(router_weight)
    rows = router_weight.detach().to(accumulation_dtype(router_weight))
    # Not by matrix products, whose rounding would part equal rows.
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distances.fill_diagonal_(torch.inf).amin(dim=-1)
    length = torch.linalg.vector_norm(rows, dim=-1)
    epsilon = torch.where(length > 0, nearest / (2.0 * length), 0.0)
    generator = torch.Generator(device=rows.device).manual_seed(seed)
    uniform = torch.rand(rows.shape, generator=generator, dtype=rows.dtype, device=rows.device)
    return 1.0 + epsilon.unsqueeze(-1) * (2.0 * uniform - 1.0)


def proxy_tokens(router_weight: Tensor, noise: Optional[Tensor]) -> Tensor:
    """[E, H] the router's rows in the accumulation dtype, times the noise if there is any."""
    proxies = router_weight.to(accumulation_dtype(router_weight))
    return proxies if noise is None else proxies * noise.detach()


def proxy_norms(proxies: Tensor, gate_weight: Tensor, total: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """M [E, L]: how strongly each proxy token excites the gate of each of L experts. An entry of 0 has gradient 0.

    Args:
        proxies: [E, H].
        gate_weight: [L, F, H], or a sequence of L matrices [F, H].
        total: where the F rows are divided over ranks, the sum over these.
    """
    squares = torch.stack([(proxies @ gate.to(proxies.dtype).T).square().sum(dim=-1) for gate in gate_weight], dim=-1)
    squares = total(squares)
    is_zero = squares == 0
    # A zero gets 1 before the root, whose slope at 0 is infinite.
    return squares.masked_fill(is_zero, 1.0).sqrt().masked_fill(is_zero, 0.0)


def excess(norms: Tensor, alpha: float) -> Tensor:
    """The loss of M [E, E]."""
    own = alpha * norms.diagonal()
    off_diagonal = 1.0 - torch.eye(len(norms), dtype=norms.dtype, device=norms.device)
    by_row = torch.relu(norms - own.unsqueeze(1))
    by_column = torch.relu(norms - own.unsqueeze(0))
    return ((by_row + by_column) * off_diagonal).sum() / len(norms) ** 2


def _check_router(router_weight: Tensor) -> None:
    check_floating("router_weight", router_weight, "[E, H]")
    if len(router_weight) < 2:
        raise ValueError(f"router_weight needs at least two experts to compare them; got E = {len(router_weight)}")
