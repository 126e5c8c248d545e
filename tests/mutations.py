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
LAYOUT = "tests/layouts/test_layouts.py::test_layout_trains_as_one_process"

# (fault, file, original, faulty, test)
MUTATIONS = [
    (
        "context-parallel factor left out",
        "integration/hooks/scaling.py",
        "scale = backward_loss_scale()",
        "scale = backward_loss_scale() / transformer_config.context_parallel_size",
        f"{LAYOUT}[CP2-plain]",
    ),
    (
        "tensor x context parallel factor left out",
        "integration/hooks/scaling.py",
        "share * total if per_token",
        "share * total / transformer_config.tensor_model_parallel_size if per_token",
        f"{LAYOUT}[TP2+SP, ETP2-per-token loss]",
    ),
    (
        "products not summed over expert-tensor-parallel ranks",
        "parallel/token_rows.py",
        "compared = total(pair_cosines(units_TKD)), inverse_lengths_TK, None",
        "compared = pair_cosines(units_TKD), inverse_lengths_TK, None",
        f"{LAYOUT}[TP2+SP, ETP2-plain]",
    ),
    (
        "products of the kernels not summed over expert-tensor-parallel ranks",
        "parallel/token_rows.py",
        "products_TKK = all_reduce_sum(fused.in_units(products_TKK, units_TK, common_TK), group)",
        "products_TKK = fused.in_units(products_TKK, units_TK, common_TK)",
        f"{LAYOUT}[TP2+SP, ETP2, EP2-Triton kernels]",
    ),
    (
        "pair across a stage boundary left out in the later stage",
        "integration/pipeline/stage_messages.py",
        "micro_batch.take_before = partial(step.next_routing, step.message_TW)",
        "pass",
        f"{LAYOUT}[PP2-plain]",
    ),
    (
        "pair across a stage boundary left out in the earlier stage's gradient",
        "integration/taps/pairs.py",
        "neighbor_grads.append(micro_batch.grad_from_next)",
        "pass",
        f"{LAYOUT}[PP2+VPP2-plain]",
    ),
    (
        "message not passed on by a stage without MoE layers",
        "integration/pipeline/stage_messages.py",
        "return self.message_TW",
        "return None",
        f"{LAYOUT}[PP2+VPP2-dense layers at the stage boundary]",
    ),
    (
        "loss scale read in forward (rows)",
        "integration/taps/expert_rows.py",
        "rows_PD = add_gradient(rows_PD, partial(run.backward.add_gradient, part), [kept_PD])",
        "scale, weight = float(run.backward.weight()[0]), run.backward.weight\n"
        "        run.backward.weight = lambda: (scale, weight()[1])\n"
        "        rows_PD = add_gradient(rows_PD, partial(run.backward.add_gradient, part), [kept_PD])",
        "tests/integration/test_gradients.py::test_gradient_scaler_is_read_in_backward",
    ),
    (
        "mean over the micro-batch's sequences instead of its tokens",
        "integration/hooks/routing.py",
        "return TokenCount(len(active_TE), len(active_TE))",
        "return TokenCount(len(active_TE), 24)",
        f"{LAYOUT}[one process-micro-batches of one sequence]",
    ),
    (
        "gradient of lengths left in the router's probabilities",
        "integration/taps/expert_rows.py",
        "backward.grad_probs_TK = grad_probs_TK[rows.own]",
        "backward.grad_probs_TK = 0.0 * grad_probs_TK[rows.own]",
        "tests/integration/test_peer_hooks.py::test_orthogonality_sends_no_gradient_into_its_router",
    ),
    (
        "ERC's gradient not counted for every rank of the expert group",
        "integration/hooks/scaling.py",
        "return backward_loss_scale() * group_count / num_shares",
        "return backward_loss_scale() / num_shares",
        f"{LAYOUT}[EP2-peers]",
    ),
    (
        "ERC's gradient not shared among the ranks of a micro-batch",
        "integration/hooks/scaling.py",
        "return backward_loss_scale() * group_count / num_shares",
        "return backward_loss_scale() * group_count",
        f"{LAYOUT}[CP2-peers]",
    ),
    (
        "ERC's gradient lost where linear layers accumulate theirs",
        "integration/compat/experts.py",
        "return transformer_config.gradient_accumulation_fusion",
        "return False",
        "tests/integration/test_peer_hooks.py::test_erc_adds_to_gradients_that_a_fused_linear_layer_accumulates",
    ),
    (
        "score variance around each rank's own mean",
        "integration/taps/scores.py",
        "mean = all_reduce_sum(routing.of_tokens(statistics).sum(dim=0), group) / routing.tokens.divisor",
        "mean = routing.of_tokens(statistics).mean(dim=0)",
        f"{LAYOUT}[CP2-peers]",
    ),
    (
        "gradient of a mean taken from each rank's own tokens",
        "integration/taps/scores.py",
        "grad_mean = all_reduce_sum(grad_mean, group) / routing.tokens.divisor",
        "grad_mean = grad_mean / routing.tokens.divisor",
        f"{LAYOUT}[CP2-losses of one's own, per-token loss, full recompute]",
    ),
    (
        "gradient of a mean left out",
        "integration/taps/scores.py",
        "total = total + (statistics * grad_mean).sum()",
        "pass",
        "tests/integration/test_gradients.py::test_losses_of_ones_own",
    ),
    (
        "router's weight counted by every rank of a micro-batch",
        "integration/taps/router_weight.py",
        "factor = weight_gradient_factor(transformer_config, count, self.layer.tp_cp_group.size())",
        "factor = weight_gradient_factor(transformer_config, count, 1)",
        f"{LAYOUT}[TP2+SP, ETP2-peers but of outputs, per-token loss, padding]",
    ),
    (
        "lengths that hold the router's probability",
        "integration/taps/expert_rows.py",
        "lengths_TK = lengths_TK / run.probs_TK.to(lengths_TK.dtype)",
        "pass",
        "tests/integration/test_gradients.py::test_each_loss_alone[orthogonality_loss]",
    ),
    (
        "ERC's tokens taken for equal on all ranks",
        "integration/taps/expert_weights.py",
        "micro_batch.etp_ep_group_count = all_reduce_sum(own, etp_ep_group(self.layer.dispatcher))",
        "micro_batch.etp_ep_group_count = own * etp_ep_group(self.layer.dispatcher).size()",
        "tests/programs/test_programs_on_ranks.py::test_ranks_with_different_numbers_of_tokens[erc]",
    ),
    (
        "load of a micro-batch not summed over the ranks that share it",
        "integration/step/diagnostics.py",
        "(loads_LME,) = reduced([torch.stack(filled).view(len(counted), most, -1)], groups)",
        "loads_LME = torch.stack(filled).view(len(counted), most, -1)",
        f"{LAYOUT}[CP2-plain]",
    ),
    (
        "padding traced as dropped",
        "integration/step/tracer.py",
        "rows_TK = rows_TK.masked_fill(padding_mask.reshape(-1, 1), PADDING)",
        "pass",
        "tests/integration/test_tracer.py::test_padding_is_told_from_what_was_dropped",
    ),
    (
        "micro-batch without tokens counted in the logged mean",
        "integration/step/losses.py",
        "self._sums[loss, layer, 1] += self._share * counts.sum()",
        "self._sums[loss, layer, 1] += self._share * len(counts)",
        "tests/programs/test_programs_alone.py::test_a_micro_batch_of_padding_counts_for_nothing",
    ),
    (
        "every forward of a pipeline step reads the first one's message",
        "integration/pipeline/stage_messages.py",
        "start, self._num_read = self._num_read, self._num_read + num_tokens",
        "start, self._num_read = 0, num_tokens",
        "tests/programs/test_programs_on_ranks.py::test_policy_and_reference_in_one_tensor_between_stages",
    ),
    (
        "order of the flex dispatcher's rows not checked",
        "integration/taps/expert_rows.py",
        "if self._check.is_due or (exchange is not None and exchange.asked):",
        "if False:",
        "tests/integration/test_row_check.py::test_another_order_of_the_library_is_noticed",
    ),
    (
        "numbers of rows not checked against the map",
        "integration/taps/row_check.py",
        "right = exchange is not None or dispatched_TE.sum(dim=0).tolist() == counts_L",
        "right = True",
        "tests/integration/test_row_check.py::test_counts_that_do_not_add_up",
    ),
    (
        "flex dispatcher's rows by another source",
        "integration/compat/dispatch.py",
        "order, _ = rows_by_source(rows_RL.T, sum(rows_for), fused)",
        "order, _ = rows_by_source(rows_RL.flip(0).T, sum(rows_for), fused)",
        f"{LAYOUT}[EP2-DeepEP]",
    ),
    (
        "rows of padding taken for rows of tokens",
        "integration/taps/expert_rows.py",
        "rows.begin(run.parts, counts_L, blocks_L)",
        "rows.begin(run.parts, (), None)",
        f"{LAYOUT}[one process-padded rows, grouped experts, moe_act recompute]",
    ),
    (
        "rows of padding exchanged as rows of tokens",
        "parallel/row_exchange.py",
        "order = order + before[order]",
        "pass",
        f"{LAYOUT}[EP2-padded rows, grouped experts, moe_act recompute]",
    ),
    (
        "rows that DeepEP adds taken for rows of tokens",
        "integration/compat/dispatch.py",
        "order = row_LT.repeat_interleave(chosen_LT.long(), output_size=len(order))[order]",
        "pass",
        f"{LAYOUT}[EP2-rows padded by the router, DeepEP, grouped experts, moe_act recompute]",
    ),
    (
        "router's map instead of the padded one",
        "integration/compat/dispatch.py",
        "return dispatcher.routing_map",
        "return routing_map_TE",
        f"{LAYOUT}[EP2-rows padded by the router, fused, grouped experts, moe_act recompute]",
    ),
    (
        "gradient of the taps not joined to the layer that a CUDA graph begins",
        "integration/taps/cuda_graphs.py",
        "return join(hidden_states, [*tapped, tapped_probs_TE]), probs",
        "return hidden_states, probs",
        "tests/integration/test_cuda_graphs.py::test_each_loss_alone[coupling_loss-moe_router]",
    ),
    (
        "gradient of lengths not joined to the layer that a CUDA graph begins",
        "integration/taps/cuda_graphs.py",
        "return join(hidden_states, [*tapped, tapped_probs_TE]), probs",
        "return join(hidden_states, tapped), probs",
        "tests/integration/test_cuda_graphs.py::test_each_loss_alone[orthogonality_loss-moe_router]",
    ),
    (
        "taps not silent while a CUDA graph is captured",
        "integration/taps/layer.py",
        "if stays_out_of_graphs(self._layer.module):",
        "if False:",
        "tests/integration/test_cuda_graphs.py::test_graphs_change_nothing[plain-moe_router]",
    ),
    (
        "router's input taken from the rows of other tokens",
        "integration/compat/cuda_graphs.py",
        "return rows_PH[row_ET.gather(0, first_1T).squeeze(0)]",
        "return rows_PH[: len(routing_map_TE)]",
        "tests/integration/test_cuda_graphs.py::test_each_loss_alone[coupling_loss-attn+moe_router+moe_preprocess]",
    ),
    (
        "gradient of the SwiGLU without the loss's",
        "kernels/swiglu.py",
        "total += tl.reshape(mixed, [TILE, BLOCK_F])",
        "pass",
        "tests/integration/test_gradients.py::test_gradient_in_the_swiglu",
    ),
    (
        "probabilities get the loss's gradient, too",
        "kernels/swiglu.py",
        "total += tl.reshape(mixed, [TILE, BLOCK_F])",
        "mixed = tl.reshape(mixed, [TILE, BLOCK_F])\n"
        "            total += mixed\n"
        "            products += mixed * (silu * up)",
        "tests/kernels/test_swiglu.py::test_the_loss_is_apart",
    ),
    (
        "gradient of the SwiGLU along a row's own direction, for tokens of two rows",
        "kernels/swiglu.py",
        "scale_0 * (z_1 - cosine * z_0)",
        "scale_0 * z_1",
        "tests/kernels/test_swiglu.py::test_the_loss_is_apart",
    ),
    (
        "gradient of the SwiGLU without what comes back from other ranks",
        "kernels/swiglu.py",
        "(total + added) * probs",
        "total * probs",
        f"{LAYOUT}[EP2-Triton kernels, fused SwiGLU]",
    ),
    (
        "gradients that come back added to other rows",
        "kernels/swiglu.py",
        "place = tl.load(places_ptr + row, mask=active, other=0).to(tl.int64)",
        "pass",
        "tests/kernels/test_swiglu_of_sum.py::test_gradients",
    ),
    (
        "probabilities get what comes back from other ranks, too",
        "kernels/swiglu.py",
        "products += total * z\n        _store_gradient(dy_rows, column, F, mask, (total + added)",
        "total += added\n        products += total * z\n        _store_gradient(dy_rows, column, F, mask, total",
        "tests/kernels/test_swiglu_of_sum.py::test_each_row_gets_its_own_and_nothing_else",
    ),
    (
        "gradient of lengths within the SwiGLU's, with expert parallelism",
        "integration/taps/activations.py",
        "fits = run.used.fused and run.probs_TK is None",
        "fits = run.used.fused",
        f"{LAYOUT}[EP2-losses of one's own, Triton kernels, fused SwiGLU]",
    ),
    (
        "gradient of the cosines left out, as a check on a GPU has to see",
        "kernels/cosines.py",
        "result = multiply_split(high, low, x, OPERAND) * scale",
        "result = multiply_split(high, low, x, OPERAND) * 0.0",
        "tests/repository/test_measurements.py::test_the_check_finds_the_kernels_right",
    ),
    (
        "check on a GPU blind for the loss's gradient beside the incoming one",
        "benchmarks/operations.py",
        "if operation.is_gradient:",
        "if False:",
        "tests/repository/test_measurements.py::test_the_check_finds_what_a_gradient_leaves_out",
    ),
    (
        "second-level cache emptied by writing",
        "benchmarks/common.py",
        "self.buffer.sum()",
        "self.buffer.zero_()",
        "tests/repository/test_measurements.py::test_the_cache_is_emptied_by_reading",
    ),
    (
        "node of the SwiGLU replaced where hooks hold its inputs",
        "integration/compat/experts.py",
        'hooked = [saved for saved in node._raw_saved_tensors if getattr(saved, "unpack_hook", True) is not None]',
        "hooked = []",
        "tests/integration/test_swiglu_replacement.py::test_anything_else_is_left_alone",
    ),
    (
        "tokens of other ranks numbered as this rank's",
        "kernels/row_indices.py",
        "place = token // share * used_of_rank + own // stride",
        "place = own // stride",
        "tests/kernels/test_row_indices.py::test_rows",
    ),
    (
        "last terms of a loss left out of its value",
        "integration/step/losses.py",
        "self._add_terms()\n        known =",
        "known =",
        "tests/integration/test_gradients.py::test_each_loss_alone",
    ),
    (
        "rows travel in their dtype, whatever was asked for",
        "integration/taps/expert_rows.py",
        "num_rows, self._a2a_dtype, asks, fused)",
        "num_rows, asks=asks, fused=fused)",
        "tests/layouts/test_layouts.py::test_fp8_a2a_trains_nearly_the_same",
    ),
    (
        "a part of an exchange forgets how rows travel",
        "parallel/row_exchange.py",
        "return replace(self, order=order, places=None, rows_for=rows_for, rows_from=rows_from)",
        "return replace(self, order=order, places=None, rows_for=rows_for, rows_from=rows_from, a2a_dtype='same')",
        "tests/parallel/test_row_exchange.py::test_rows_come_to_their_tokens_and_go_back",
    ),
    (
        "order of rows checked on the ranks alone that ask",
        "integration/compat/dispatch.py",
        "value=int(asks))",
        "value=0)",
        "tests/integration/test_disagreeing_ranks.py::test_another_order_of_rows_is_noticed_on_all_ranks_if_one_asks",
    ),
    (
        "tokens summed over the ranks alone that have a mask",
        "integration/hooks/routing.py",
        "elif group.size() == 1:",
        "elif True:",
        "tests/integration/test_disagreeing_ranks.py::test_a_padding_mask_on_one_rank_is_one_on_all",
    ),
    (
        "what a forward computes counted before its backward",
        "integration/hooks/micro_batch.py",
        "if self._waiting is None:",
        "if True:",
        "tests/integration/test_steps.py::test_a_forward_that_fails_or_is_left_out_counts_for_nothing",
    ),
    (
        "a step that runs again counted twice",
        "integration/step/clock.py",
        "elif self._attempts > 1 or self._forwards > 1:",
        "elif False:",
        "tests/integration/test_steps.py::test_a_step_that_runs_again_counts_once",
    ),
    (
        "hooks of others run after the losses'",
        "integration/hooks/replacement.py",
        "hooks.move_to_end(handle.id)",
        "pass",
        "tests/integration/test_hooks.py::test_hooks_that_work_in_place_are_the_same_before_attach_and_after",
    ),
    (
        "replaced modules not looked for",
        "integration/taps/layer.py",
        "if not runs(found, hooked):",
        "if False:",
        "tests/integration/test_lost_losses.py::test_what_is_replaced_after_attach_is_named",
    ),
    (
        "ERC's gradient not added where the experts begin",
        "integration/taps/expert_weights.py",
        "return add_weight_gradients(inputs_PH, weights, lambda: run.gradients())",
        "return inputs_PH",
        "tests/integration/test_peer_hooks.py::test_erc_adds_to_gradients_that_a_fused_linear_layer_accumulates",
    ),
    (
        "ERC's gradient added before Transformer Engine's linear layers write theirs",
        "integration/taps/expert_weights.py",
        """        return add_weight_gradients(inputs_PH, weights, lambda: run.gradients())

    def tap_outputs(self, outputs_PH: Tensor) -> Tensor:
""",
        """        return inputs_PH

    def tap_outputs(self, outputs_PH: Tensor) -> Tensor:
        if (run := self._run) is not None:
            weights = [self.layer.router.weight, *expert_first_weights(self.layer.module)]
            outputs_PH = add_weight_gradients(outputs_PH, weights, lambda: run.gradients())
""",
        "tests/te/test_te_accumulation.py::test_accumulated_gradients_are_those_of_autograd",
    ),
]
ENGINE = ROOT / ".venv-te" / "bin" / "python"  # of tests/te; make test-te makes it


def source(root: Path, file: str) -> Path:
    """The path of a mutation's file, of the package or of benchmarks/."""
    return root / file if file.startswith("benchmarks/") else root / "megatron_moe_spec" / file


def main(word: str = "") -> int:
    missed = []
    for fault, file, original, faulty, test in MUTATIONS:
        if word not in fault:
            continue
        with tempfile.TemporaryDirectory() as folder:
            for part in ("megatron_moe_spec", "tests", "examples", "benchmarks", "pyproject.toml"):
                copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
                copy(ROOT / part, Path(folder) / part)
            path = source(Path(folder), file)
            text = path.read_text()
            if text.count(original) != 1:
                raise SystemExit(f"{fault}: {file} holds this {text.count(original)} times instead of once: {original}")
            path.write_text(text.replace(original, faulty))
            python = ENGINE if test.startswith("tests/te/") else sys.executable
            run = subprocess.run(
                [python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test],
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
