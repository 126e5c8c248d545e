"""Shows that the tests see what they are there to see: each of these faults, put into a copy, must make its test fail.

    python tests/mutations.py [word of a name]
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAYOUT = "tests/test_layouts.py::test_layout_trains_as_one_process"

# (fault, file, original, faulty, test)
MUTATIONS = [
    (
        "context-parallel factor left out",
        "integration/compat.py",
        "return scale * config.context_parallel_size if lacks_size else scale",
        "return scale if config.calculate_per_token_loss else scale / config.context_parallel_size",
        f"{LAYOUT}[CP2-plain]",
    ),
    (
        "tensor x context parallel factor left out",
        "integration/scaling.py",
        "return scale * num_tokens if config.calculate_per_token_loss else scale",
        "return scale * num_tokens / config.tensor_model_parallel_size if config.calculate_per_token_loss else scale",
        f"{LAYOUT}[TP2+SP, ETP2-per-token loss]",
    ),
    (
        "products not summed over expert-tensor-parallel ranks",
        "integration/specialization.py",
        "self._cosines_TKK = summed(pair_cosines(units_TKF), self._group)",
        "self._cosines_TKK = pair_cosines(units_TKF)",
        f"{LAYOUT}[TP2+SP, ETP2-plain]",
    ),
    (
        "products of the kernels not summed over expert-tensor-parallel ranks",
        "integration/specialization.py",
        "products_TKK = summed(kernels.in_units(products_TKK, units_TK, common_TK), self._group)",
        "products_TKK = kernels.in_units(products_TKK, units_TK, common_TK)",
        f"{LAYOUT}[TP2+SP, ETP2, EP2-Triton kernels]",
    ),
    (
        "pair across a stage boundary left out in the later stage",
        "integration/pipeline.py",
        "micro_batch.take_before = functools.partial(_take, step, self._form)",
        "pass",
        f"{LAYOUT}[PP2-plain]",
    ),
    (
        "pair across a stage boundary left out in the earlier stage's gradient",
        "integration/layer.py",
        "pulls.append(micro_batch.pull_after)",
        "pass",
        f"{LAYOUT}[PP2+VPP2-plain]",
    ),
    (
        "message not passed on by a stage without MoE layers",
        "integration/pipeline.py",
        "message_TW = step.message(self._form) if self._has_layers else step.message_TW",
        "message_TW = step.message(self._form) if self._has_layers else None",
        f"{LAYOUT}[PP2+VPP2-dense layers at the stage boundary]",
    ),
    (
        "loss scale read in forward (specialization)",
        "integration/layer.py",
        "return add_gradient(z, partial(self._add_specialization_gradient, rows, part, mean, routing.num_tokens))",
        "factor = gradient_factor(self._config, routing.num_tokens)\n"
        "        weight = settings.specialization_loss_coeff * mean * factor\n"
        "        return add_gradient(z, partial(rows.add_gradient, part, weight))",
        "tests/test_gradients.py::test_gradient_scaler_is_read_in_backward",
    ),
    (
        "mean over the micro-batch's sequences instead of its tokens",
        "integration/coupling.py",
        "return LayerRouting(live_TE, len(live_TE), len(live_TE) * group.size())",
        "return LayerRouting(live_TE, len(live_TE), 24)",
        f"{LAYOUT}[one process-micro-batches of one sequence]",
    ),
    (
        "orthogonality's gradient left in the router's probabilities",
        "integration/orthogonality.py",
        "probs_gradients.append(-(reaches_P",
        "probs_gradients.append(0 * (reaches_P",
        "tests/test_peer_hooks.py::test_orthogonality_sends_no_gradient_into_its_router",
    ),
    (
        "ERC's gradient not counted for every rank of the expert group",
        "integration/scaling.py",
        "return backward_loss_scale(config) * group_count / num_shares",
        "return backward_loss_scale(config) / num_shares",
        f"{LAYOUT}[EP2-peers]",
    ),
    (
        "ERC's gradient not shared among the ranks of a micro-batch",
        "integration/scaling.py",
        "return backward_loss_scale(config) * group_count / num_shares",
        "return backward_loss_scale(config) * group_count",
        f"{LAYOUT}[CP2-peers]",
    ),
    (
        "ERC's gradient lost where linear layers accumulate theirs",
        "integration/compat.py",
        "return config.gradient_accumulation_fusion",
        "return False",
        "tests/test_peer_hooks.py::test_erc_adds_to_gradients_that_a_fused_linear_layer_accumulates",
    ),
    (
        "score variance around each rank's own mean",
        "integration/score_variance.py",
        "return summed(scores_TE.sum(dim=0), group) / num_tokens",
        "return scores_TE.mean(dim=0)",
        f"{LAYOUT}[CP2-peers]",
    ),
    (
        "ERC's tokens taken for equal on all ranks",
        "integration/expert_router_coupling.py",
        "micro_batch.expert_group_count = summed(own, expert_group(self._dispatcher))",
        "micro_batch.expert_group_count = own * expert_group(self._dispatcher).size()",
        "tests/test_programs.py::test_ranks_with_different_numbers_of_tokens[erc]",
    ),
    (
        "micro-batch without tokens counted in the logged mean",
        "integration/recorder.py",
        "entry[1] += 1.0 / self._num_shares * counts",
        "entry[1] += 1.0 / self._num_shares",
        "tests/test_other_programs.py::test_a_micro_batch_of_padding_counts_for_nothing",
    ),
    (
        "every forward of a pipeline step reads the first one's message",
        "integration/pipeline.py",
        "start, step.num_taken = step.num_taken, step.num_taken + num_tokens",
        "start, step.num_taken = 0, num_tokens",
        "tests/test_programs.py::test_policy_and_reference_in_one_tensor_between_stages",
    ),
]


def main(word: str = "") -> int:
    missed = []
    for fault, file, original, faulty, test in MUTATIONS:
        if word not in fault:
            continue
        with tempfile.TemporaryDirectory() as folder:
            for part in ("megatron_moe_spec", "tests", "examples", "pyproject.toml"):
                copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
                copy(ROOT / part, Path(folder) / part)
            path = Path(folder) / "megatron_moe_spec" / file
            text = path.read_text()
            if text.count(original) != 1:
                raise SystemExit(f"{fault}: {file} holds this {text.count(original)} times instead of once: {original}")
            path.write_text(text.replace(original, faulty))
            run = subprocess.run(
                [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": folder},
                capture_output=True,
                text=True,
            )
        # 1: tests ran and failed; anything else is no evidence.
        seen = run.returncode == 1 and " failed" in run.stdout
        print(f"{'seen  ' if seen else 'MISSED'} {fault}: {test}", flush=True)
        if not seen:
            missed.append(fault)
            print(run.stdout[-2000:])
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
