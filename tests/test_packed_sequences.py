"""Packed sequences (``thd``): the losses are those of each sequence alone."""

import pytest
import torch
import torch.nn.functional as F
from loss_names import LOSS_NAMES, coefficients
from processes import needs_megatron

from megatron_moe_spec import SpecConfig, attach

pytestmark = needs_megatron

LENGTHS = [5, 12, 7, 12]


class PackedAttention(torch.nn.Module):
    """Core attention that knows ``cu_seqlens``, as Transformer Engine's does and Megatron's own does not."""

    def __init__(self, *args, **kwargs):
        super().__init__()

    def forward(self, query, key, value, *args, packed_seq_params=None, **kwargs):
        if packed_seq_params is None:  # [s, b, heads, d]
            x = F.scaled_dot_product_attention(*(x.permute(1, 2, 0, 3) for x in (query, key, value)), is_causal=True)
            return x.permute(2, 0, 1, 3).flatten(2)
        ends = packed_seq_params.cu_seqlens_q.tolist()  # [t, heads, d]
        outputs = [
            F.scaled_dot_product_attention(*(x[a:b].transpose(0, 1) for x in (query, key, value)), is_causal=True)
            for a, b in zip(ends, ends[1:])
        ]
        return torch.cat([x.transpose(0, 1) for x in outputs])


@pytest.fixture
def packed_attention(megatron, monkeypatch):
    from megatron.core.models.backends import LocalSpecProvider

    monkeypatch.setattr(LocalSpecProvider, "core_attention", lambda self: PackedAttention)


def _sequences() -> list:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 64, (1, length), generator=generator) for length in LENGTHS]


def _packed(model, sequences):
    """Loss of each token of all sequences in one micro-batch."""
    from megatron.core.packed_seq_params import PackedSeqParams

    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    packing = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=max(LENGTHS), max_seqlen_kv=max(LENGTHS)
    )
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0)
    labels = torch.cat([x.roll(-1, 1) for x in sequences], dim=1)
    return model(torch.cat(sequences, dim=1), positions, None, labels=labels, packed_seq_params=packing)


def _one_by_one(model, sequences):
    outputs = [model(x, torch.arange(x.shape[1])[None], None, labels=x.roll(-1, 1)) for x in sequences]
    return torch.cat(outputs, dim=1)


def _attached(mm, names, **settings):
    model = mm.build_model(calculate_per_token_loss=True, **settings)
    return model, attach(model, SpecConfig(**coefficients(names), kernels="torch"))


# Of score variance and the losses of weights, a micro-batch is more than the sum of its tokens.
@pytest.mark.parametrize("name", ["specialization_loss", "coupling_loss", "orthogonality_loss"])
@pytest.mark.parametrize("settings", [{}, dict(moe_grouped_gemm=True)], ids=["sequential", "grouped"])
def test_packed_sequences_train_as_one_by_one(packed_attention, mm, name, settings):
    """With a loss per token, the losses' gradients are sums over tokens too.

    The main loss has its full weight: to the last router these losses leave nothing but what rounding makes of it.
    """
    results = []
    for run in (_packed, _one_by_one):
        model, handle = _attached(mm, [name], **settings)
        losses = run(model, _sequences())
        losses.sum().backward()
        results.append((losses, {n: p.grad for n, p in model.named_parameters()}, handle.metrics()))
    (losses, gradients, _), (expected_losses, expected, _) = results
    assert torch.allclose(losses, expected_losses, rtol=1e-5)
    for parameter, gradient in expected.items():
        assert float((gradients[parameter] - gradient).norm()) < 1e-5 * float(gradient.norm()), parameter


def test_forward_of_packed_sequences_is_that_without_losses(packed_attention, mm):
    outputs = [_packed(_attached(mm, names)[0], _sequences()) for names in ([], LOSS_NAMES)]
    assert torch.equal(*outputs)
