"""Base classes of losses: frozen dataclasses that declare options, what they read of an MoE layer, and arithmetic.

A loss knows neither Megatron, nor triton, nor other ranks: that is for the tap of what it reads
(``megatron_moe_spec.integration.taps``). To add one, derive from one of the classes below that end in ``Loss``; give it
a ``name`` and a ``coeff`` made by ``option``.

Suffixes: T tokens, E experts, K = ``moe_router_topk`` experts of a token, D components of a vector, H hidden size.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, ClassVar, Optional, Protocol

import torch
from torch import Tensor

from megatron_moe_spec.losses.scores import accumulation_dtype, check_floating
from megatron_moe_spec.losses.vectors import pair_cosines, unit_vectors

# What a loss may read of an MoE layer.
ACTIVATIONS = "activations"  # z, of the experts of each token: SwiGLU outputs, before the down projection
OUTPUTS = "outputs"  # x, of the experts of each token: after the down projection, without the router's probability
SCORES = "scores"  # of the router, normalised over all experts
PAIRS = "pairs of layers"  # the routing of adjacent MoE layers
ROUTER_WEIGHT = "router weight"
EXPERT_WEIGHTS = "expert weights"  # together with the router's

A2A_DTYPES = ("same", "fp8")  # how vectors travel between ranks: in their dtype, or as e4m3 with a scale each


def option(
    default: Any,
    flag: str,
    help: str,
    choices: Optional[Sequence[str]] = None,
    minimum: float = 0,
    paper: str = "",
    hidden_by_default: bool = False,
) -> Any:
    """A dataclass field that is a command-line flag, and a field of ``SpecConfig``.

    Args:
        default: a float, an int or a string, which also is the option's type.
        flag: starts with ``--moe-``. The field of ``SpecConfig`` has its name without that.
        help: what ``--help`` and the documentation say.
        choices: of a string.
        minimum: of a number.
        paper: the value in the paper, and where it stands there.
        hidden_by_default: whether messages leave a word out where it is the default, as they do numbers.
    """
    metadata = dict(flag=flag, help=help, choices=choices, minimum=minimum, paper=paper)
    metadata["hidden_by_default"] = hidden_by_default or choices is None
    return dataclasses.field(default=default, metadata=metadata)


def options_of(owner: Any) -> list[dataclasses.Field[Any]]:
    """The options of a dataclass, or of an instance of one."""
    return [one for one in dataclasses.fields(owner) if "flag" in one.metadata]


def config_field(one: dataclasses.Field[Any]) -> str:
    """The field of ``SpecConfig`` that holds an option."""
    return one.metadata["flag"].removeprefix("--moe-").removeprefix("spec-").replace("-", "_")


def check_options(owner: object) -> None:
    """Raises ValueError that names the field of ``SpecConfig`` and the flag of an option without a fitting value."""
    for one in options_of(owner):
        value, choices, minimum = getattr(owner, one.name), one.metadata["choices"], one.metadata["minimum"]
        name = f"{config_field(one)} ({one.metadata['flag']})"
        if choices:
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
        elif isinstance(one.default, str):
            if not isinstance(value, str):
                raise ValueError(f"{name} must be a string; got {value!r}")
        else:
            _check_number(name, value, type(one.default), minimum)


def _check_number(name: str, value: Any, kind: type, minimum: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number; got {value!r}")
    if kind is int and not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number; got {value!r}")
    if not isfinite(value) or value < minimum:
        least = f"at least {minimum}" if minimum else "not negative"
        raise ValueError(f"{name} must be finite and {least}; got {value!r}")


class ModelSettings(Protocol):
    """What losses read of Megatron's TransformerConfig."""

    moe_router_topk: int
    num_moe_experts: int
    gated_linear_unit: bool


@dataclass(frozen=True)
class Loss:
    """A loss of every MoE layer, or of every pair of adjacent ones. Derive from one of the classes below.

    Attributes:
        name: in the logs; ends in ``_loss``.
        reads: what it reads of a layer; one of the constants above, among ``may_read``.
        measured: whether it is computed and logged in steps of ``metrics_interval``, too, if its coefficient is 0.
        coeff: its weight; see ``is_trained``.
    """

    name: ClassVar[str]
    reads: ClassVar[str]
    may_read: ClassVar[tuple[str, ...]] = (PAIRS, EXPERT_WEIGHTS)
    measured: ClassVar[bool] = False
    coeff: float

    def __post_init__(self) -> None:
        which, reads = f"the loss {type(self).__name__}", getattr(self, "reads", None)
        if not isinstance(getattr(self, "name", None), str):
            raise ValueError(f"{which} needs a name, as a class attribute")
        if reads not in self.may_read:
            raise ValueError(f"{which} must have reads = {' or '.join(map(repr, self.may_read))}; got {reads!r}")
        check_options(self)
        if not any(one.name == "coeff" for one in options_of(self)):
            _check_number(f"coeff of {self.name}", self.coeff, float, 0)

    @property
    def title(self) -> str:
        """Its name in messages."""
        return self.name.removesuffix("_loss").replace("_", " ")

    def __str__(self) -> str:
        """Like "coupling (mass, exact) x 0.001": its options but the coefficient; some only if changed."""
        others = [(one, getattr(self, one.name)) for one in options_of(self) if one.name != "coeff"]
        words = [value for one, value in others if not one.metadata["hidden_by_default"]]
        changed = [(one, value) for one, value in others if one.metadata["hidden_by_default"] and value != one.default]
        words += [f"{one.name} {value if one.metadata['choices'] else format(value, 'g')}" for one, value in changed]
        shown = f" ({', '.join(words)})" if words else ""
        return f"{self.title}{shown} x {self.coeff:g}"

    @property
    def is_trained(self) -> bool:
        """Whether it adds a gradient."""
        return self.coeff > 0

    @property
    def flag(self) -> str:
        """Of its coefficient."""
        return next((one.metadata["flag"] for one in options_of(self) if one.name == "coeff"), f"{self.name}'s coeff")

    @property
    def carries_messages(self) -> bool:
        """Whether it needs the routing of layers in other pipeline stages."""
        return False

    def problems(self, transformer_config: ModelSettings) -> Iterator[str]:
        """Yields what the arithmetic lacks in a model, with the remedy. The tap says what cannot be read.

        Args:
            transformer_config: Megatron's TransformerConfig of an MoE layer.
        """
        return iter(())

    def units(self, transformer_config: ModelSettings) -> Iterator[str]:
        """Yields what the coefficient is in the units of the loss's paper, where those differ; see ``problems``."""
        return iter(())

    @property
    def off(self) -> str:
        """The setting by which the loss is not computed."""
        return f"{self.flag} to 0" if not self.measured else f"{self.flag} and --moe-spec-metrics-interval to 0"


@dataclass(frozen=True)
class RowsLoss(Loss):
    """A loss of the angles between, and the lengths of, the vectors that the experts of a token compute.

    Derived classes set ``reads`` to ACTIVATIONS or OUTPUTS. The tap differentiates ``token_losses``, and has the
    kernels, the exchange of rows with other ranks and the stride over tokens.

    Attributes:
        token_stride: use every N-th token only.
        a2a_dtype: how the vectors and their gradients travel between ranks, one of ``A2A_DTYPES``.
        uses_lengths: whether ``token_losses`` uses the vectors' lengths. If not, it gets None for them.
    """

    may_read: ClassVar[tuple[str, ...]] = (ACTIVATIONS, OUTPUTS)
    token_stride = 1
    a2a_dtype = "same"
    uses_lengths: ClassVar[bool] = True

    def token_losses(self, cosines_TKK: Tensor, lengths_TK: Tensor, active_TK: Tensor) -> Tensor:
        """[T] the loss of each token. Differentiable; each token's depends on that token's values alone.

        Args:
            cosines_TKK: between the vectors of a token; 0 on the diagonal, of zero vectors, and where there is none.
            lengths_TK: of the vectors; 0 where there is none.
            active_TK: bool, which there are: a token may have fewer than K experts. Tokens without any count as 0.
        """
        raise NotImplementedError

    def squares_divisor(self, k: int) -> Optional[float]:
        """By what ``token_losses`` divides the sum of the squared cosines of the ordered pairs of a token's k vectors.

        The kernels know the gradient of that sum. None: ``token_losses`` computes something else.
        """
        return None

    def problems(self, transformer_config: ModelSettings) -> Iterator[str]:
        if transformer_config.moe_router_topk < 2:
            yield (
                f"{self.title} compares the experts of a token and needs at least two "
                f"(--moe-router-topk is {transformer_config.moe_router_topk}; set it to 2 or more, or {self.off})"
            )

    def of_vectors(self, name: str, x: Tensor, valid: Optional[Tensor] = None) -> Tensor:
        """The loss of the vectors [T, K, D] themselves, see ``token_mean``; ``name`` is that of x in errors.

        Raises:
            ValueError: a shape or dtype does not fit, or K < 2.
        """
        check_floating(name, x, "[T, K, D]")
        if x.shape[1] < 2:
            raise ValueError(
                f"{name} needs at least two experts per token (k >= 2) to compare them; got k = {x.shape[1]}"
            )
        if valid is not None and (valid.shape != x.shape[:2] or valid.dtype != torch.bool):
            raise ValueError(f"valid must be bool {list(x.shape[:2])}; got {valid.dtype} {list(valid.shape)}")
        active = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if valid is None else valid
        x = x.to(accumulation_dtype(x)).masked_fill(~active.unsqueeze(-1), 0.0)
        units, _ = unit_vectors(x)
        # |x| as <x, u>, whose gradient is u: in range wherever x is.
        lengths = (x * units.detach()).sum(dim=-1)
        return token_mean(one_per_token(self, self.token_losses(pair_cosines(units), lengths, active), len(x)))


@dataclass(frozen=True)
class ScoresLoss(Loss):
    """A loss of each token's router scores, and, if it says so, of means over the tokens of the micro-batch."""

    reads: ClassVar[str] = SCORES
    may_read: ClassVar[tuple[str, ...]] = (SCORES,)

    def token_statistics(self, scores_TE: Tensor, active_TE: Tensor) -> Optional[Tensor]:
        """[T, ...] what of each token ``token_losses`` needs the mean of; None: nothing. Differentiable."""
        return None

    def token_losses(self, scores_TE: Tensor, active_TE: Tensor, mean: Optional[Tensor]) -> Tensor:
        """[T] the loss of each token. Differentiable, also through ``mean``.

        Args:
            scores_TE: the router's, each row summing to 1, in fp32.
            active_TE: bool, the experts that the token was dispatched to.
            mean: of ``token_statistics`` over all tokens of the micro-batch, wherever they are.
        """
        raise NotImplementedError

    def of_scores(self, scores: Tensor, active: Optional[Tensor] = None) -> Tensor:
        """The loss of scores [T, E], as on one rank; ``active``: none by default.

        Raises:
            ValueError: a shape or dtype does not fit.
        """
        check_floating("scores", scores, "[T, E]")
        scores = scores.to(accumulation_dtype(scores))
        active = torch.zeros_like(scores, dtype=torch.bool) if active is None else active
        statistics = self.token_statistics(scores, active)
        mean = None if statistics is None else token_mean(statistics)
        return token_mean(one_per_token(self, self.token_losses(scores, active, mean), len(scores)))


@dataclass(frozen=True)
class RouterWeightLoss(Loss):
    """A loss of the router's weight alone."""

    reads: ClassVar[str] = ROUTER_WEIGHT
    may_read: ClassVar[tuple[str, ...]] = (ROUTER_WEIGHT,)

    def of_weight(self, router_weight_EH: Tensor) -> Tensor:
        """Scalar; differentiable."""
        raise NotImplementedError


THIRD_PARTY = (RowsLoss, ScoresLoss, RouterWeightLoss)  # what losses of other packages may derive from


def one_per_token(loss: Loss, losses_T: Tensor, num_tokens: int) -> Tensor:
    """``losses_T`` as it is; raises ValueError that names the loss where it is not of shape [T]."""
    if losses_T.shape != (num_tokens,):
        raise ValueError(
            f"{type(loss).__name__}.token_losses must return the loss of each token, [{num_tokens}]; got "
            f"{list(losses_T.shape)}"
        )
    return losses_T


def token_mean(x: Tensor) -> Tensor:
    """Mean over the first dimension; 0 of nothing."""
    return x.sum(dim=0) / max(len(x), 1)
