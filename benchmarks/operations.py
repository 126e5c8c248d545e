"""The kernels' operations on random tensors of a model's shape, eager baselines, and the check against float64."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from common import Shape, device

from megatron_moe_spec.kernels import cosines as row_kernels
from megatron_moe_spec.kernels import mass as mass_kernels
from megatron_moe_spec.kernels import row_indices as row_index_kernels
from megatron_moe_spec.kernels import swiglu as swiglu_kernels
from megatron_moe_spec.losses.coupling import routed_mass
from megatron_moe_spec.losses.scores import normalized_scores, normalized_scores_gradient
from megatron_moe_spec.losses.vectors import mixed, mixing_of_squares, packed, pair_cosines, unit_vectors, unpacked
from megatron_moe_spec.parallel.row_indices import rows_of_tokens

WEIGHT = 0.25


@dataclass
class Operation:
    """One operation: by the kernel, by eager PyTorch, and on which tensors.

    Attributes:
        inputs: of both; the last one of a gradient is the incoming gradient.
        outputs: of the kernel.
        eager_inputs: further ones of ``eager``.
        tables: the kernels that it launches, by their names in ``kernels.options``.
    """

    name: str
    kernel: Callable
    eager: Callable
    inputs: tuple
    outputs: tuple
    tables: tuple[str, ...]
    eager_inputs: tuple = ()

    @property
    def is_gradient(self) -> bool:
        return self.name.endswith("gradient")

    @property
    def least_bytes(self) -> int:
        """Each input once and each output once."""
        return _num_bytes(self.inputs) + _num_bytes(self.outputs)

    @property
    def only_reads(self) -> bool:
        """Whether it writes next to nothing."""
        return 10 * _num_bytes(self.outputs) < _num_bytes(self.inputs)

    def run_kernel(self):
        return self.kernel(*self.inputs)

    def run_eager(self):
        return self.eager(*self.inputs, *self.eager_inputs)


def _num_bytes(tensors: tuple) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, torch.Tensor))


def eager_cosines(z, rows):
    units, inverse = unit_vectors(z[rows])
    cosines = packed(pair_cosines(units))
    return cosines, inverse, 2.0 * cosines.square().sum()


def eager_mix(z, rows, covered, mixing, inverse, weight, incoming, positions):
    """Gathers the rows' gradients by ``positions``, the inverse permutation of ``rows``."""
    units = z[rows].to(inverse.dtype) * inverse.unsqueeze(-1)
    gradient = mixed(mixing, units, inverse) * weight
    return incoming + gradient.flatten(0, 1)[positions].to(incoming.dtype)


def eager_squares_gradient(z, rows, covered, cosines, inverse, weight, incoming, positions):
    mixing = mixing_of_squares(unpacked(cosines, rows.shape[1]))
    return eager_mix(z, rows, covered, mixing, inverse, weight, incoming, positions)


def eager_swiglu_gradient(y, probs, rows, covered, cosines, inverse, weight, incoming, positions):
    """Rounds what lies in memory where the kernel does not run: z, and its gradient."""
    parts = up, _, silu = swiglu_parts(y, probs)
    z = (silu * up * probs.unsqueeze(-1)).to(y.dtype)
    total = eager_squares_gradient(z, rows, covered, cosines, inverse, weight, incoming, positions)
    return swiglu_gradients(parts, probs, total, incoming, y.dtype)


def eager_swiglu_gradient_of_sum(y, probs, added, places, incoming):
    return swiglu_gradients(swiglu_parts(y, probs), probs, incoming + added[places], incoming, y.dtype)


def swiglu_parts(y, probs):
    """In the dtype of the probabilities: up, sigmoid of gate, silu of gate."""
    gate, up = y.to(probs.dtype).chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    return up, sigmoid, gate * sigmoid


def swiglu_gradients(parts, probs, total, incoming, dtype):
    """Of y in ``dtype``, from the gradient ``total`` of z, and of the probabilities, from the gradient ``incoming``."""
    up, sigmoid, silu = parts
    total = total * probs.unsqueeze(-1)
    dy = torch.cat((total * up * (sigmoid + silu * (1.0 - sigmoid)), total * silu), dim=-1)
    return dy.to(dtype), (incoming * silu * up).sum(dim=-1)


def kernel_swiglu_gradient_of_sum(y, probs, added, places, incoming):
    return swiglu_kernels.swiglu_gradient_of_sum(y, probs, incoming, added, places)


def eager_rows(live, top_k, num_rows):
    return rows_of_tokens(live, live, top_k, num_rows)


def kernel_rows(live, top_k, num_rows):
    return row_index_kernels.rows_of_tokens(live, live, top_k, num_rows)


def eager_mass(logits, live, score_function, previous):
    mass = routed_mass(normalized_scores(logits, score_function), live)
    return mass, (mass * previous).sum()


def kernel_mass(logits, live, score_function, previous):
    return mass_kernels.routed_mass(logits, live, score_function, previous)


def kernel_mass_gradient(logits, live, score_function, neighbor_grad, weight, incoming):
    return mass_kernels.add_mass_gradient(logits, live, score_function, [neighbor_grad], weight, incoming)


def eager_mass_gradient(logits, live, score_function, neighbor_grad, weight, incoming):
    gradient = normalized_scores_gradient(logits, score_function, live * neighbor_grad.unsqueeze(-1) * weight)
    return incoming + gradient.to(incoming.dtype)


def operations(shape: Shape, num_tokens: int, dtype=torch.bfloat16) -> list[Operation]:
    """Every token has its experts, rows lie by (expert, token)."""
    torch.manual_seed(0)
    options = dict(device=device())
    logits = torch.randn(num_tokens, shape.experts, **options)
    live = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, logits.topk(shape.top_k).indices, True)
    num_rows = num_tokens * shape.top_k
    rows, covered = rows_of_tokens(live, live, shape.top_k, num_rows)
    positions = rows.flatten().argsort()
    y = torch.randn(num_rows, 2 * shape.ffn, dtype=dtype, **options)
    probs = torch.rand(num_rows, **options) + 0.1
    gate, up = y.chunk(2, dim=-1)
    z = (torch.nn.functional.silu(gate) * up * probs.unsqueeze(-1)).to(dtype)
    incoming = torch.randn(num_rows, shape.ffn, dtype=dtype, **options)
    cosines, inverse, squares = row_kernels.row_cosines(z, rows)
    mixing = mixing_of_squares(unpacked(cosines, shape.top_k))
    previous, grad_logits = torch.rand(num_tokens, **options), torch.randn_like(logits)
    scored, of_rows = (logits, live, shape.score_function), (inverse, WEIGHT, incoming)
    return [
        Operation(
            "cosines", row_kernels.row_cosines, eager_cosines, (z, rows), (cosines, inverse, squares), ("cosines",)
        ),
        Operation(
            "mixing gradient",
            row_kernels.add_mixed,
            eager_mix,
            (z, rows, covered, mixing, *of_rows),
            (z,),
            ("mixing",),
            (positions,),
        ),
        Operation(
            "cosines gradient",
            row_kernels.add_squares_gradient,
            eager_squares_gradient,
            (z, rows, covered, cosines, *of_rows),
            (z,),
            ("mixing",),
            (positions,),
        ),
        Operation(
            "SwiGLU gradient",
            swiglu_kernels.swiglu_gradient,
            eager_swiglu_gradient,
            (y, probs, rows, covered, cosines, *of_rows),
            (y, probs),
            ("swiglu_gradient",),
            (positions,),
        ),
        Operation(
            "SwiGLU gradient of a sum",
            kernel_swiglu_gradient_of_sum,
            eager_swiglu_gradient_of_sum,
            (y, probs, torch.randn_like(incoming), positions.int(), incoming),
            (y, probs),
            ("swiglu_gradient_of_sum",),
        ),
        Operation(
            "row indices",
            kernel_rows,
            eager_rows,
            (live, shape.top_k, num_rows),
            (rows, covered),
            ("row_indices",),
        ),
        Operation("mass", kernel_mass, eager_mass, (*scored, previous), (previous,), ("mass",)),
        Operation(
            "mass gradient",
            kernel_mass_gradient,
            eager_mass_gradient,
            (*scored, previous, WEIGHT, grad_logits),
            (logits,),
            ("mass",),
        ),
    ]


def errors(operation: Operation) -> list[dict]:
    """Compares each output of the kernel, and of eager, with eager's in float64; see ``_errors`` for the columns.

    A gradient is compared once more with an incoming gradient of zero. By the side of an incoming one, the loss's may
    be so small that the result is right without it.
    """
    found = _errors(operation)
    if operation.is_gradient:
        *others, incoming = operation.inputs
        alone = replace(operation, name=f"{operation.name}, alone", inputs=(*others, torch.zeros_like(incoming)))
        found += _errors(alone)
    return found


def _errors(operation: Operation) -> list[dict]:
    """A row an output: the largest errors, the magnitude that they are relative to, and whether the kernel is right."""
    exact = operation.eager(*map(_in_double, operation.inputs), *operation.eager_inputs)
    results = (_outputs(result) for result in (exact, operation.run_kernel(), operation.run_eager()))
    rows = []
    for number, (exact, kernel, eager) in enumerate(zip(*results, strict=True)):
        worst = [_largest_error(found, exact) for found in (kernel, eager)]
        # A cosine is a sum of products that cancel, of vectors of length 1.
        magnitude = 1.0 if (operation.name, number) == ("cosines", 0) else float(exact.double().abs().max())
        row = {"operation": operation.name, "output": number, "kernel_error": worst[0], "eager_error": worst[1]}
        rows.append({**row, "magnitude": magnitude, "right": worst[0] <= worst[1] + 2e-5 * magnitude})
    return rows


def _in_double(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def _outputs(result) -> list[torch.Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def _largest_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    if exact.dim() == 0:  # the kernel's are partial sums
        found = found.double().sum()
    if found.shape != exact.shape:
        return float("inf")
    return float((found.double() - exact.double()).abs().max())
