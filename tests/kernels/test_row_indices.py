"""Where the rows of each token lie: the kernels and the eager reference against a loop over the rows."""

import pytest
import torch
from kernel_cases import DEVICE

from megatron_moe_spec.parallel import row_indices as eager

pytest.importorskip("triton", reason="triton is not installed")

from megatron_moe_spec.kernels import row_indices as kernels

IMPLEMENTATIONS = {"kernels": kernels.rows_of_tokens, "eager": eager.rows_of_tokens}


def maps(num_tokens, num_experts, k, seed=0):
    """The dispatched map, with at most k experts a token, and the three quarters of it that count."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(num_tokens, num_experts, generator=generator).argsort(dim=1)
    dispatched = order < torch.randint(k + 1, (num_tokens, 1), generator=generator)
    return dispatched.to(DEVICE), (dispatched & (torch.rand(order.shape, generator=generator) < 0.75)).to(DEVICE)


def one_by_one(dispatched, active, k, num_rows, tokens, num_ranks, only_used, blocks):
    """Walks through the rows as a dispatcher lays them out."""
    share = len(dispatched) // num_ranks
    used = [rank * share + token for rank in range(num_ranks) for token in range(share)[tokens]]
    rows, used_rows = [[] for _ in used], [False] * num_rows
    position = 0
    for expert in range(dispatched.shape[1]):
        if blocks is not None:
            position = sum(blocks[:expert])
        for token in range(len(dispatched)):
            if dispatched[token, expert] and (token in used or not only_used):
                if token in used and active[token, expert]:
                    rows[used.index(token)].append(position)
                    used_rows[position] = True
                position += 1
    return [row + [-1] * (k - len(row)) for row in rows], used_rows


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "num_tokens, num_experts, k, tokens, num_ranks",
    [
        (1, 2, 1, slice(0, None, 1), 1),
        (40, 8, 3, slice(0, None, 1), 1),
        (70, 5, 2, slice(2, None, 3), 1),
        (66, 12, 4, slice(1, None, 4), 3),
        (3, 130, 8, slice(0, None, 2), 1),
        (2, 4, 2, slice(5, None, 7), 1),  # no token is used
    ],
)
@pytest.mark.parametrize("only_used, padded", [(False, False), (True, False), (False, True)])
def test_rows(implementation, num_tokens, num_experts, k, tokens, num_ranks, only_used, padded):
    dispatched, active = maps(num_tokens, num_experts, k)
    share = num_tokens // num_ranks
    is_used = torch.tensor([token % share in range(share)[tokens] for token in range(num_tokens)], device=DEVICE)
    counts = (dispatched & is_used[:, None] if only_used else dispatched).sum(dim=0).tolist()
    blocks = [-(-count // 4) * 4 for count in counts] if padded else None
    num_rows = sum(blocks or counts)
    expected = one_by_one(dispatched, active, k, num_rows, tokens, num_ranks, only_used, blocks)
    starts = None if blocks is None else eager.first_rows(blocks, torch.device(DEVICE))
    rows, used = IMPLEMENTATIONS[implementation](dispatched, active, k, num_rows, tokens, num_ranks, only_used, starts)
    assert rows.dtype == torch.int32 and rows.shape == (len(expected[0]), k)
    assert rows.tolist() == expected[0]
    assert used.tolist() == expected[1]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_tokens(implementation):
    empty = torch.zeros(0, 4, dtype=torch.bool, device=DEVICE)
    rows, used = IMPLEMENTATIONS[implementation](empty, empty, 2, 0)
    assert rows.shape == (0, 2) and used.shape == (0,)


def test_worked_example():
    dispatched = torch.tensor([[1, 0, 1], [1, 1, 0]], dtype=torch.bool, device=DEVICE)
    for rows_of_tokens in IMPLEMENTATIONS.values():
        rows, used = rows_of_tokens(dispatched, dispatched, 2, 4)
        assert rows.tolist() == [[0, 3], [1, 2]] and used.all()


def test_experts_of_tokens():
    active = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    experts, there = eager.experts_of_tokens(active, 2)
    assert experts.tolist() == [[1, 3], [0, 0], [0, 0]]
    assert there.tolist() == [[True, True], [True, False], [False, False]]


def test_arguments_that_do_not_fit():
    dispatched, active = maps(6, 4, 2)
    with pytest.raises(ValueError, match="dispatched_TE"):
        kernels.rows_of_tokens(dispatched.int(), active, 2, 6)
    with pytest.raises(ValueError, match="active_TE"):
        kernels.rows_of_tokens(dispatched, active[:3], 2, 6)


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (1, 1), (4, 1), (1, 4), (8, 32)])
def test_order_by_source_and_its_inverse(shape):
    for seed in range(3):
        counts = torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        num_rows = int(counts.sum())
        expected, _ = eager.rows_by_source(counts, num_rows)
        for blocks in (counts, counts.int(), counts.transpose(0, -1).contiguous().transpose(0, -1)):
            order, places = kernels.rows_by_source(blocks, num_rows)
            assert order.tolist() == expected.tolist()
            assert order[places.long()].tolist() == list(range(num_rows))


def test_order_by_source_of_many_rows():
    counts = torch.tensor([[5000, 0], [1, 1025]], device=DEVICE)
    order, places = kernels.rows_by_source(counts, 6026)
    assert order.tolist() == [*range(5001), *range(5001, 6026)] and places.tolist() == order.tolist()
