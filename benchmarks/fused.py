"""Megatron's SwiGLU backward and the loss's gradient, against the one kernel that computes both; row indices.

    python benchmarks/fused.py [--tokens 8192 32768] [--output FOLDER] [--smoke]

Without the fusion, ``add_squares_gradient`` adds the loss's gradient to that of the SwiGLU's output, which Megatron's
backward then reads: 6 + 10 bytes an element of bf16. ``swiglu_gradient`` moves 10: it reads 2 F inputs and F gradients
of a row and writes 2 F. Both are first checked against float64: the unfused kernels may err by their roundings to bf16,
and the fused one by no more than they do; else it is WRONG.
"""

import argparse
import os
import sys
from pathlib import Path

if "--smoke" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["TORCHDYNAMO_DISABLE"] = "1"

import torch
from common import MODELS, RESULTS, SMOKE, Results, against_transfer, device, milliseconds
from megatron.core.fusions.fused_bias_swiglu import weighted_swiglu, weighted_swiglu_back

from megatron_moe_spec.kernels import cosines as row_kernels
from megatron_moe_spec.kernels import row_indices, swiglu
from megatron_moe_spec.parallel.row_indices import rows_of_tokens

# Of the largest value: two roundings to bf16 of half a unit each, and those of z and of its gradient.
ROUNDINGS = 2.0**-6


def exact_swiglu(y, probs):
    gate, up = y.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up * probs.unsqueeze(-1)


def squares(z, rows):
    """The sum over tokens of the squared cosines between the rows of each, over ordered pairs."""
    units = torch.nn.functional.normalize(z[rows.long()], dim=-1)
    return 2.0 * (units @ units.mT).tril(-1).square().sum()


class Case:
    """Random rows of a model's experts, and the functions to be compared on them."""

    def __init__(self, shape, num_tokens: int):
        torch.manual_seed(0)
        options = dict(device=device())
        chosen = torch.rand(num_tokens, shape.experts, **options).topk(shape.top_k).indices
        self.map = torch.zeros(num_tokens, shape.experts, dtype=torch.bool, **options).scatter_(1, chosen, True)
        self.top_k, self.num_rows = shape.top_k, num_tokens * shape.top_k
        self.y = torch.randn(self.num_rows, 2 * shape.ffn, **options).bfloat16()
        self.incoming = torch.randn(self.num_rows, shape.ffn, **options).bfloat16()
        self.probs = torch.rand(self.num_rows, **options) + 0.1
        self.rows, self.covered = self.row_indices()
        self.probs_column = self.probs.unsqueeze(-1)
        # Compiled once, for any number of rows, as in training after the second number.
        for tensor in (self.y, self.incoming, self.probs_column):
            torch._dynamo.mark_dynamic(tensor, 0)
        self.z, self.weight = self.forward(), 1.0
        self.cosines, self.inverse, _ = self.row_cosines()

    def row_indices(self):
        return row_indices.rows_of_tokens(self.map, self.map, self.top_k, self.num_rows)

    def eager_row_indices(self):
        return rows_of_tokens(self.map, self.map, self.top_k, self.num_rows)

    def forward(self):
        return weighted_swiglu(self.y, self.probs_column)

    def row_cosines(self):
        return row_kernels.row_cosines(self.z, self.rows)

    def backward(self, incoming=None):
        incoming = self.incoming if incoming is None else incoming
        return weighted_swiglu_back(incoming, self.y, self.probs_column)

    def of_loss(self):
        arguments = (self.rows, self.covered, self.cosines, self.inverse, self.weight)
        return row_kernels.add_squares_gradient(self.z, *arguments, self.incoming)

    def unfused(self):
        return self.backward(self.of_loss())

    def fused(self):
        arguments = (self.rows, self.covered, self.cosines, self.inverse, self.weight)
        return swiglu.swiglu_gradient(self.y, self.probs, *arguments, self.incoming)

    def exact(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """float64: z, and the gradients of y, of the probabilities without the loss (which does not see them).

        Weighs the loss first, so that its gradient is as large as the incoming one: an error in either shows.
        """
        y, probs = self.y.double().requires_grad_(), self.probs.double().requires_grad_()
        z, incoming = exact_swiglu(y, probs), self.incoming.double()
        loss = squares(z, self.rows)
        (of_loss,) = torch.autograd.grad(loss, z, retain_graph=True)
        self.weight = float(incoming.abs().max() / of_loss.abs().max())
        return z.detach(), *torch.autograd.grad(self.weight * loss + (z * incoming).sum(), (y, probs))


def relative_error(found, exact) -> float:
    return float((found.double().view_as(exact) - exact).abs().max() / exact.abs().max())


def check(case: Case) -> dict:
    exact_z, exact_dy, exact_dprobs = case.exact()
    row = {"z_error": relative_error(case.z, exact_z)}
    # How often Megatron's compiled z is not the one it computes uncompiled, which a recomputation would give.
    with torch.compiler.set_stance("force_eager"):
        row["z_differing"] = float((case.forward() != case.z).float().mean())
    for name, (dy, dprobs) in {"fused": case.fused(), "unfused": case.unfused()}.items():
        row[f"{name}_dy_error"] = relative_error(dy, exact_dy)
        row[f"{name}_dprobs_error"] = relative_error(dprobs, exact_dprobs)
    rows_of_both = zip(case.row_indices(), case.eager_row_indices())
    row["row_indices_right"] = all(torch.equal(found[: len(other)], other) for found, other in rows_of_both)
    errors_right = all(
        row[f"unfused_{of}_error"] <= ROUNDINGS and row[f"fused_{of}_error"] <= row[f"unfused_{of}_error"] + 1e-5
        for of in ("dy", "dprobs")
    )
    return {**row, "right": errors_right and row["row_indices_right"]}


# Bytes that each has to move, an element of z in bf16; row indices are few.
TIMED = {
    "forward": 6,
    "row_cosines": 2,
    "backward": 10,
    "of_loss": 6,
    "unfused": 16,
    "fused": 10,
    "row_indices": None,
    "eager_row_indices": None,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768], help="of a micro-batch (%(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on CPU in Triton's interpreter")
    arguments = parser.parse_args()
    smoke, failed = arguments.smoke, False
    check_tokens, all_tokens = (10, [10]) if smoke else (256, arguments.tokens)
    checks, results = [], Results(arguments.output, "fused")
    results.facts["errors, relative to the largest value"] = checks
    for model, shape in (SMOKE if smoke else MODELS).items():
        torch._dynamo.reset()  # as in training, one size of rows is known to the compiler
        row = {"model": model, **check(Case(shape, check_tokens))}
        checks.append(row)
        results.save()
        print(f"{'' if row['right'] else 'WRONG '}{row}", flush=True)
        failed |= not row["right"]
        for num_tokens in all_tokens:
            case = Case(shape, num_tokens)
            for name, bytes_of_element in TIMED.items():
                took = milliseconds(getattr(case, name), *((1, 0) if smoke else (20, 3)))
                row = {"model": model, "tokens": num_tokens, "operation": name, "ms": round(took, 4)}
                if bytes_of_element:
                    least = bytes_of_element * case.z.numel()
                    row.update({"bytes": bytes_of_element, **against_transfer(took, least, name == "row_cosines")})
                results.add(row)
            case = None
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
