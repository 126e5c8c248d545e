"""The message that rides on hidden states between pipeline stages."""

import gc
import weakref

import pytest
import torch

from megatron_moe_spec.parallel.messages import (
    Append,
    Strip,
    bits_to_numbers,
    decode,
    encode,
    is_marked,
    numbers_to_bits,
    packed_length,
    sequence_length,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_sequence_length_is_the_inverse_of_packed_length(dtype):
    for hidden_size in (1, 7, 64):
        for width in (1, 3, 9, 200):
            for sequence in range(1, 40):
                packed = packed_length(sequence, hidden_size, dtype, width)
                assert packed > sequence
                assert sequence_length(packed, hidden_size, dtype, width) == sequence


@pytest.mark.parametrize("dtype, error", list(zip(DTYPES, (0.0, 2.0**-16, 2.0**-21))))
@pytest.mark.parametrize("sequence, batch, hidden_size, width", [(5, 2, 8, 1), (3, 4, 16, 19), (1, 1, 4, 3)])
def test_decode_is_the_inverse_of_encode(dtype, error, sequence, batch, hidden_size, width):
    message = torch.rand(sequence * batch, width)
    rows = encode(message, torch.empty(sequence, batch, hidden_size, dtype=dtype), width)
    assert rows.dtype == dtype and rows.shape[1:] == (batch, hidden_size)
    assert len(rows) == packed_length(sequence, hidden_size, dtype, width) - sequence
    assert (decode(rows, sequence * batch, width) - message).abs().max() <= error


@pytest.mark.parametrize("dtype, error", list(zip(DTYPES, (0.0, 2.0**-16, 2.0**-21))))
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_a_message_of_fewer_tokens_than_the_step_returns(dtype, error, num_tokens):
    """A step may return more than the hidden states that the chunk computed."""
    message = torch.rand(num_tokens, 3)
    decoded = decode(encode(message, torch.empty(5, 2, 8, dtype=dtype), 3), 10, 3)
    expected = torch.cat([message, torch.zeros(10 - num_tokens, 3)])
    assert (decoded - expected).abs().max() <= error


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sequence, batch, hidden_size, width", [(5, 2, 8, 1), (3, 4, 16, 19), (1, 1, 2, 1)])
def test_a_message_is_marked_and_nothing_else_is(dtype, sequence, batch, hidden_size, width):
    hidden_states = torch.randn(sequence, batch, hidden_size).to(dtype)
    rows = encode(torch.rand(sequence * batch, width), hidden_states, width)
    assert is_marked(rows)
    assert is_marked(encode(None, hidden_states, width))
    for other in (torch.randn(rows.shape).to(dtype), torch.zeros_like(rows), rows.roll(1, -1), 2 * rows):
        assert not is_marked(other)


def test_no_message_is_zeros():
    assert not decode(encode(None, torch.ones(4, 2, 8), 3), 8, 3).any()


@pytest.mark.parametrize("num_bits", [1, 8, 9, 60])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_survive_every_dtype(num_bits, dtype):
    bits = torch.rand(5, num_bits) < 0.5
    numbers = bits_to_numbers(bits)
    assert numbers.shape == (5, -(-num_bits // 8))
    assert torch.equal(numbers_to_bits(numbers.to(dtype).float(), num_bits), bits)


def test_messages_travel_both_ways_and_touch_no_gradient():
    """Stage one: y = 2 x. Stage two: sum(3 y)."""
    x = torch.randn(4, 2, 8, requires_grad=True)
    there, back = torch.rand(8, 1), torch.rand(8, 1)
    received = {}
    sent = Append.apply(2.0 * x, encode(there, x.detach(), 1), lambda rows: received.update(back=decode(rows, 8, 1)))
    arrived = sent.detach().requires_grad_()
    assert torch.equal(decode(arrived.detach()[4:], 8, 1), there)
    y = Strip.apply(arrived, 4, lambda gradient: encode(back, gradient, 1))
    assert torch.equal(y, 2.0 * x)
    (3.0 * y).sum().backward()
    sent.backward(arrived.grad)
    assert torch.equal(received["back"], back)
    assert torch.equal(x.grad, torch.full_like(x, 6.0))


def test_a_pipeline_model_that_nobody_detached_is_freed(mm):
    """The context around Megatron's schedules holds on to nothing of the model, and lives as long as it does."""
    from megatron_moe_spec import SpecConfig
    from megatron_moe_spec.integration.compat import schedules
    from megatron_moe_spec.integration.pipeline.cross_stage import CrossStageCoupling
    from megatron_moe_spec.integration.pipeline.stages import Stages

    model = mm.build_model()
    before = len(schedules._around_schedules)
    CrossStageCoupling(
        [model], Stages([3, 3], [0], 4), SpecConfig(coupling_loss_coeff=1.0, coupling_across_stages="exact")
    )
    gc.collect()
    assert len(schedules._around_schedules) == before + 1
    gone = weakref.ref(model), weakref.ref(model.config)
    del model
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
    assert len(schedules._around_schedules) == before
