"""The op fuser: an MLP of fused operations, in which ``linear_fc2`` never runs as a module.

Losses that read the activations at its input are refused; all others are exact.
"""

from unittest import mock

import pytest
from loss_names import LOSS_NAMES
from test_gradients import SELECTIVE, _compare
from test_te_accumulation import FUSION, GROUPED, check_accumulation

FUSER = dict(use_transformer_engine_op_fuser=True, **GROUPED)
NAMES = [name for name in LOSS_NAMES if name != "specialization_loss"]


@pytest.fixture(autouse=True)
def fused_forwards(megatron, monkeypatch):
    """Counts them; and has Transformer Engine take fused operations where its fused kernel, for Blackwell, is not."""
    from megatron.core.transformer.moe.experts import TEGroupedMLP

    monkeypatch.setenv("NVTE_CUTEDSL_FUSED_GROUPED_MLP", "1")
    with mock.patch.object(TEGroupedMLP, "_fused_forward", autospec=True, side_effect=TEGroupedMLP._fused_forward) as f:
        yield f


@pytest.mark.parametrize("kernels", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("recompute", [{}, dict(**SELECTIVE, recompute_modules=["moe"])], ids=["none", "moe"])
def test_gradients_equal_autograd(fused_forwards, recompute, kernels):
    _compare({**FUSER, **recompute}, {}, names=NAMES, reference=GROUPED, options=dict(kernels=kernels))
    assert fused_forwards.call_count


@pytest.mark.parametrize("marks_every_step", [False, True], ids=["marked once", "marked every step"])
def test_accumulated_gradients_are_those_of_autograd(mm, marks_every_step):
    check_accumulation(mm, GROUPED, {**FUSER, **FUSION}, NAMES, marks_every_step, 0.1)


def test_activations_are_refused(mm):
    from megatron_moe_spec import SpecConfig, attach

    model = mm.build_model(**FUSER)
    with pytest.raises(ValueError, match="specialization.*--use-transformer-engine-op-fuser"):
        attach(model, SpecConfig(specialization_loss_coeff=1.0))
