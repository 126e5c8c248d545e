"""Ranks that do not agree neither wait for each other for ever nor train on something else: right, or all refuse."""

import json

import pytest
import torch
from forks import ranks
from processes import needs_megatron
from test_layouts import CP, DEEPEP, EP, HYBRIDEP, PP

pytestmark = [needs_megatron, pytest.mark.slow]
DISPATCHERS = dict(alltoall={}, allgather=dict(moe_token_dispatcher_type="allgather"), DeepEP=DEEPEP, HybridEP=HYBRIDEP)
REFUSALS = dict(model="--transformer-impl", folder="--moe-spec-trace-path", modules="all model chunks")


@pytest.fixture
def disagree(tmp_path):
    """Runs a function of ``disagreements.py`` on two ranks; what each of them returns. A hang fails soon."""

    def run(name: str, **settings) -> list:
        output = tmp_path / name
        ranks(2, "disagreements.py", name, output, json.dumps(settings), timeout=60)
        return [torch.load(f"{output}.{rank}") for rank in range(2)]

    return run


def _assert_close(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("dispatcher", DISPATCHERS.values(), ids=DISPATCHERS)
def test_weights_loaded_on_one_rank(disagree, dispatcher):
    settings = dict(sizes={EP: 2}, dispatcher=dispatcher)
    expected = disagree("weights_loaded_on_one_rank", loads=False, **settings)
    found = disagree("weights_loaded_on_one_rank", loads=True, **settings)
    for (gradients, values), (expected_gradients, expected_values) in zip(found, expected):
        _assert_close(gradients, expected_gradients)
        assert values == expected_values


def test_another_order_of_rows_is_noticed_on_all_ranks_if_one_asks(disagree):
    for loads in (True, False):
        settings = dict(sizes={EP: 2}, dispatcher=HYBRIDEP, loads=loads, reorders=True)
        errors = disagree("weights_loaded_on_one_rank", **settings)
        assert all((error is not None) == loads for error in errors)
        assert not loads or all("rows that the flex dispatcher hands" in error for error in errors)


def test_a_padding_mask_on_one_rank_is_one_on_all(disagree):
    expected = disagree("padding_on_one_rank", sizes={CP: 2}, everywhere=True)
    found = disagree("padding_on_one_rank", sizes={CP: 2}, everywhere=False)
    assert [has_mask for *_, has_mask in found] == [True, False]
    for (gradients, values, *_), (expected_gradients, expected_values, *_) in zip(found, expected):
        _assert_close(gradients, expected_gradients)
        assert values == expected_values


@pytest.mark.parametrize(
    "sizes, where",
    [({}, "model"), ({}, "folder"), ({PP: 2}, "model"), ({PP: 2}, "folder"), ({PP: 2}, "modules")],
    ids=["DP2-model", "DP2-folder", "PP2-model", "PP2-folder", "PP2-modules"],
)
def test_all_ranks_refuse_if_one_does(disagree, sizes, where):
    problem = REFUSALS[where]
    (error, hooked), (other_error, other_hooked) = disagree("refused_on_one_rank", sizes=sizes, where=where)
    assert error.startswith("ValueError: ") and problem in error and "on rank" not in error
    assert other_error.startswith("ValueError: on rank 0: ") and problem in other_error
    assert not hooked and not other_hooked


def test_ranks_that_do_not_attach_are_named_with_the_remedy(disagree):
    error, _ = disagree("model_on_one_rank")
    assert error.startswith("RuntimeError: other ranks") and "attach(model, config, group=...)" in error


def test_ranks_with_another_number_of_micro_batches_have_no_violation_of_each(disagree):
    for first, second in disagree("micro_batches_on_one_rank"):
        assert first is None and second == pytest.approx(1.0)


def test_a_step_that_failed_on_one_rank_ends_on_both(disagree):
    (error, values, alone), (no_error, other_values, other_alone) = disagree("step_that_failed_on_one_rank", sizes={})
    assert error == "MemoryError: out of memory" and no_error is None
    assert values == alone == other_values == other_alone
    assert {"specialization_loss", "coupling_loss", "diagnostics"} <= values.keys()
