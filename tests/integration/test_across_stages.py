"""--moe-coupling-across-stages auto: exact where the pipeline's schedule can carry what it needs, else drop."""

from types import SimpleNamespace

import pytest

from megatron_moe_spec import SpecConfig
from megatron_moe_spec.integration.pipeline.stages import Stages
from megatron_moe_spec.integration.support.checks import resolve_across_stages

PIPELINE, ONE_RANK = Stages([2, 2], [0], 4), Stages([2, 2], [0, 1], 4)


@pytest.mark.parametrize(
    "stages, settings, resolved",
    [
        (PIPELINE, {}, "exact"),
        (PIPELINE, dict(overlap_moe_expert_parallel_comm=True), "drop"),
        (PIPELINE, dict(mtp_standalone=True), "drop"),
        (ONE_RANK, dict(overlap_moe_expert_parallel_comm=True), "exact"),
    ],
)
def test_auto(stages, settings, resolved):
    found = resolve_across_stages(SpecConfig(coupling_loss_coeff=1.0), stages, SimpleNamespace(**settings))
    assert found == SpecConfig(coupling_loss_coeff=1.0, coupling_across_stages=resolved)
    assert found.carries_messages == (resolved == "exact")


@pytest.mark.parametrize("asked", ["exact", "drop"])
def test_what_is_asked_for_stays(asked):
    spec = SpecConfig(coupling_loss_coeff=1.0, coupling_across_stages=asked)
    assert resolve_across_stages(spec, PIPELINE, SimpleNamespace(overlap_moe_expert_parallel_comm=True)) is spec


def test_handle_says_what_is_done(mm):
    from megatron_moe_spec import attach

    assert attach(mm.build_model(), SpecConfig(coupling_loss_coeff=1.0)).config.coupling_across_stages == "exact"
