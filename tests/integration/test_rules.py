"""The list of what is not supported: each rule is documented and tested, and its texts can be made."""

import re

import pytest
import test_remedies
from processes import ROOT
from rule_texts import BY_NAME, message_of

from examples import unsupported
from megatron_moe_spec import SpecConfig
from megatron_moe_spec.integration.support.facts import ModelFacts
from megatron_moe_spec.integration.support.rules import RULES
from megatron_moe_spec.kernels import choose

# Refusals that no flag of a run brings about, as far as the doctor can tell, and the tests that do.
NOT_BY_FLAGS = {
    "some of a rank's model chunks": "integration/test_hybrid.py::"
    "test_virtual_stages_given_one_by_one_are_refused_by_what_makes_them",
    "--moe-spec-kernels triton where Triton cannot run": "integration/test_refusals.py::"
    "test_kernels_that_cannot_run_are_refused",
    "a frozen model": "programs/test_programs_alone.py::test_a_frozen_model_is_refused",
    "CUDA graphs over MoE layers, made by no setting": "integration/test_refusals.py::"
    "test_a_layer_that_is_captured_whole_all_the_same_is_an_error",
    "CUDA graphs over adapted routers": "integration/test_refusals.py::"
    "test_cuda_graphs_over_an_adapted_router_are_refused",
    "CUDA graphs over moe_router with a padding mask": "integration/test_cuda_graphs.py::"
    "test_padding_is_refused_where_the_router_is_not_told",
    "legacy GroupedMLP": "integration/test_refusals.py::test_legacy_grouped_gemm_is_refused",
    "rows in an unknown order": "integration/test_row_check.py::test_another_order_of_the_library_is_noticed",
    "adapters around the router": "programs/test_programs_alone.py::test_a_loss_of_adapted_weights_is_refused_by_name",
    "adapters around the router or linear_fc1": "programs/test_programs_alone.py::"
    "test_a_loss_of_adapted_weights_is_refused_by_name",
}


def test_each_refusal_has_a_name_of_its_own_and_a_remedy():
    assert len(BY_NAME) == len(RULES)
    assert all(rule.remedy for rule in RULES if rule.refuses)


def test_each_refusal_is_tested():
    """By flags and by its remedy in test_remedies.py, or by the test that stands above."""
    by_flags = {rule for rule, *_ in test_remedies.CASES} - {""}
    refusing = {rule.name for rule in RULES if rule.refuses}
    assert not by_flags & NOT_BY_FLAGS.keys()
    assert refusing - by_flags - NOT_BY_FLAGS.keys() == set(), "add a case to tests/integration/test_remedies.py"
    assert by_flags | NOT_BY_FLAGS.keys() == refusing


@pytest.mark.parametrize("name", NOT_BY_FLAGS)
def test_tests_by_other_means_compare_the_message(name):
    file, test = NOT_BY_FLAGS[name].split("::")
    text = (ROOT / "tests" / file).read_text()
    assert f"def {test}(" in text and f'"{name}"' in text and "message_of(" in text


def test_the_document_is_made_from_the_rules():
    assert unsupported.REPORT.read_text() == unsupported.report(), "make unsupported"


def test_the_document_has_a_row_for_each_rule():
    rows = re.findall(r"^\| (.+?) \|", unsupported.report().replace("`", ""), re.M)
    assert {rule.name for rule in RULES} <= {row.removesuffix(" (notice)") for row in rows}


def test_kernels_say_the_same_when_they_run(monkeypatch):
    monkeypatch.setattr("megatron_moe_spec.kernels.unavailable", lambda device: "there is no GPU")
    with pytest.raises(ValueError) as error:
        choose.__wrapped__("triton", None)
    assert re.fullmatch(f"{message_of('--moe-spec-kernels triton where Triton cannot run')}.*", str(error.value))


def test_nothing_is_refused_where_nothing_is_hooked():
    facts = ModelFacts(SpecConfig(), None, None, 1, 1, ("", ""), True, False, "none")
    assert not [text for rule in RULES for text in rule.complaints(facts)]
