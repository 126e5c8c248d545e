"""Four ranks: rows of experts, laid out by loops, come to their tokens, and go back.

Dispatchers are stand-ins that hold what Megatron's hold between dispatch and combine. A layout is a list of rows
(source, tensor-parallel rank, token, expert), None where a row is padding; the first component of a row is its number.
"""

from types import SimpleNamespace

import torch
import torch.distributed as dist
from synchronisations import Synchronisations

from megatron_moe_spec.integration.compat.dispatch import row_exchange
from megatron_moe_spec.parallel.row_exchange import RowExchange

TOKENS, EXPERTS, WIDTH = 5, 8, 3


def members(map_TE, experts):
    """(expert, token) of a map, in this order."""
    return [(e, t) for e in experts for t in range(len(map_TE)) if map_TE[t, e]]


class Case:
    """Random maps [R, C, T, E], the same on all processes, and what this one has of them."""

    def __init__(self, seed, tensor_size, density, capacity=None, experts=EXPERTS):
        draw = torch.rand(4 // tensor_size, tensor_size, TOKENS, experts, generator=torch.Generator().manual_seed(seed))
        self.maps = draw < density
        if capacity:
            self.maps = draw >= draw.topk(capacity, dim=2).values[:, :, -1:]
        self.ranks, self.peers = 4 // tensor_size, tensor_size
        self.rank, self.peer = divmod(dist.get_rank(), tensor_size)
        groups = [dist.new_group(list(range(peer, 4, tensor_size))) for peer in range(tensor_size)]
        self.ep_group, self.local = groups[self.peer], experts // self.ranks
        self.here = range(self.rank * self.local, (self.rank + 1) * self.local)
        self.capacity = capacity
        self.num_experts = experts

    def dispatcher(self, kind, **manager):
        counts_RL = self.maps.sum(dim=(1, 2))[:, self.here[0] : self.here[-1] + 1]
        sent_RL = self.maps.sum(dim=(1, 2))[self.rank].view(self.ranks, -1)
        return SimpleNamespace(
            config=SimpleNamespace(
                moe_token_dispatcher_type=kind, moe_router_padding_for_quantization="dispatched_indices" in manager
            ),
            ep_size=self.ranks, tp_size=self.peers, tp_rank=self.peer, num_local_experts=self.local,
            ep_group=self.ep_group, tp_ep_group=dist.group.WORLD, capacity=self.capacity,
            num_global_tokens_per_local_expert=counts_RL,
            output_splits=None if self.capacity else counts_RL.sum(dim=1).numpy(),
            input_splits=None if self.capacity else sent_RL.sum(dim=1).numpy(),
            local_map=self.maps.flatten(0, 2)[:, self.here[0] : self.here[-1] + 1].contiguous(),
            _comm_manager=SimpleNamespace(**manager),
        )  # fmt: skip

    def layout(self, *outer):
        """Rows of this rank's experts, by local expert, then as ``outer`` loops over (source, tensor-parallel rank)."""
        return [[(r, c, t, e) for r, c in outer for t in range(TOKENS) if self.maps[r, c, t, e]] for e in self.here]

    @property
    def own_TE(self):
        return self.maps[self.rank].flatten(0, 1)

    @property
    def home(self):
        """Rows of this source's tokens, by (expert, tensor-parallel rank, token)."""
        return [(self.rank, t // TOKENS, t % TOKENS, e) for e, t in members(self.own_TE, range(self.num_experts))]

    def tensor(self, rows):
        numbers = [
            0 if row is None else 1 + torch.tensor(row).dot(torch.tensor([1000, 400, 20, 1])).item() for row in rows
        ]
        return torch.tensor(numbers, dtype=torch.float32).view(-1, 1).expand(-1, WIDTH).contiguous()


def check(case, dispatcher, blocks, pad, synchronisations):
    """blocks: each expert's rows, as the dispatcher hands them over; pad: how many rows each is padded by."""
    counts = [len(block) for block in blocks]
    blocks = [[*block, *[None] * padding] for block, padding in zip(blocks, pad)]
    rows = [row for block in blocks for row in block]
    x, expected = case.tensor(rows), case.tensor(case.home)
    with Synchronisations() as found:
        exchange = row_exchange(dispatcher, case.own_TE, sum(counts))
        exchange = exchange.in_blocks(counts, [len(block) for block in blocks], x.device)
    assert len(found.names) == synchronisations, found.names
    assert torch.equal(exchange.to_tokens(x), expected)
    pending = exchange.begin_to_tokens(x)
    changed = x.clone()
    x.zero_()  # as Megatron does with the storage of activations that it recomputes
    assert torch.equal(pending.wait(), expected)
    x = changed
    is_row = torch.tensor([row is not None and row[3] in case.here for row in rows], dtype=torch.bool)
    assert torch.equal(exchange.to_experts(expected), x * is_row.view(-1, 1))
    # A part, and a part of a part.
    for _ in range(2):
        chosen = torch.rand(len(expected), generator=torch.Generator().manual_seed(dist.get_rank())) < 0.5
        with Synchronisations() as found:
            exchange = exchange.part(chosen)
        assert found.names == ["tolist"], found.names
        expected = expected[chosen]
        assert torch.equal(exchange.to_tokens(x), expected)
        back = exchange.to_experts(expected)
        kept = back[:, 0] != 0
        assert torch.equal(back[kept], x[kept])
        assert int(kept.sum()) == sum(exchange.rows_for)


def pads(case, padded):
    return [(3 * e) % 4 if padded else 0 for e in case.here]


def with_fillers(case, seed):
    """DeepEP's received tokens [T', K] and map [T', L], and the rows that Megatron makes of them."""
    tokens = [(r, t) for r in range(case.ranks) for t in range(TOKENS) if case.maps[r, 0, t][list(case.here)].any()]
    chosen = [[e - case.here[0] for e in case.here if case.maps[r, 0, t, e]] for r, t in tokens]
    indices = torch.tensor([one + [-1] * (case.local - len(one)) for one in chosen], dtype=torch.int64)
    indices = indices.view(-1, case.local)
    filled = torch.rand(len(tokens), case.local, generator=torch.Generator().manual_seed(seed)) < 0.3
    for row, one in enumerate(chosen):
        filled[row, one] = True
    tokens = [(r, 0, t) for r, t in tokens]
    blocks = [
        [(*tokens[i], e) if local in chosen[i] else None for i in range(len(tokens)) if filled[i, local]]
        for local, e in enumerate(case.here)
    ]
    return indices, filled, blocks


def check_layouts():
    for seed in range(6):
        density = (0.3, 0.7, 0.02)[seed % 3]
        for padded in (False, True):
            for experts in (EXPERTS, 4):
                case = Case(seed, 1, density, experts=experts)
                by_source = case.layout(*((r, 0) for r in range(4)))
                check(case, case.dispatcher("alltoall"), by_source, pads(case, padded), 0)
                check(case, case.dispatcher("allgather"), by_source, pads(case, padded), 1)
                check(case, case.dispatcher("flex"), by_source, pads(case, padded), 1)
            case = Case(seed, 1, 0, capacity=2)
            check(case, case.dispatcher("alltoall"), case.layout(*((r, 0) for r in range(4))), pads(case, padded), 0)
            case = Case(seed, 2, density)
            by_peer = case.layout(*((r, c) for c in range(2) for r in range(2)))
            check(case, case.dispatcher("alltoall"), by_peer, pads(case, padded), 1)
            by_token = case.layout(*((r, c) for r in range(2) for c in range(2)))
            check(case, case.dispatcher("allgather"), by_token, pads(case, padded), 1)
            case = Case(seed, 1, density)
            indices, filled, blocks = with_fillers(case, seed)
            dispatcher = case.dispatcher("flex", dispatched_indices=indices, dispatched_routing_map=filled)
            check(case, dispatcher, blocks, pads(case, padded), 1)


def exchanges(a2a_dtype, order=True, empty=False):
    """Of 0 to 6 rows between each two ranks; the number of rows that leave, and that arrive."""
    rank = dist.get_rank()
    numbers = torch.randint(0, 1 if empty else 7, (4, 4), generator=torch.Generator().manual_seed(3))
    rows_for, rows_from = numbers[rank].tolist(), numbers[:, rank].tolist()
    order = torch.randperm(sum(rows_for)) if order else None
    return RowExchange(order, sum(rows_for), rows_for, rows_from, dist.group.WORLD, a2a_dtype), *map(
        sum, (rows_for, rows_from)
    )


def check_fp8():
    torch.manual_seed(dist.get_rank())
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for width in (1, 7, 64):
            for order in (False, True):
                torch.manual_seed(dist.get_rank())
                exchange, number, home = exchanges("fp8", order)
                torch.manual_seed(dist.get_rank())
                exact, _, _ = exchanges("same", order)
                x = (torch.randn(number, width) * torch.logspace(-2, 2, number).view(-1, 1)).to(dtype)
                if number > 3:
                    x[0], x[1, 0], x[2, -1], x[3, 0] = 0, torch.inf, torch.nan, -torch.inf
                for there, y in (("to_tokens", x), ("to_experts", torch.randn(home, width).to(dtype))):
                    found, expected = getattr(exchange, there)(y), getattr(exact, there)(y)
                    assert found.dtype == dtype and found.shape == expected.shape
                    finite = expected.isfinite().all(dim=1)
                    assert found[~finite].isnan().all()
                    found, expected = found[finite].float(), expected[finite].float()
                    # Half a unit in the last of e4m3's 4 places, or of its smallest number; and dtype's own rounding.
                    largest = expected.abs().amax(dim=1, keepdim=True)
                    bound = expected.abs() / 2**4 + largest / 448 / 2**10 + expected.abs() * torch.finfo(dtype).eps
                    assert ((found - expected).abs() <= bound * 1.0001 + torch.finfo(dtype).tiny).all()
                    assert (found[largest.squeeze(1) == 0] == 0).all()
                first, second = exchange.to_tokens(x), exchange.begin_to_tokens(x).wait()
                assert torch.equal(first.nan_to_num(), second.nan_to_num()), "backward's rows are not forward's"
                flags = torch.randint(0, 256, (number,), dtype=torch.uint8)
                assert torch.equal(exchange.to_tokens(flags), exact.to_tokens(flags))
                assert exchange.part(torch.ones(home, dtype=torch.bool)).a2a_dtype == "fp8"
    for order in (False, True):
        exchange, _, _ = exchanges("fp8", order, empty=True)
        assert exchange.to_tokens(torch.zeros(0, 5)).shape == exchange.to_experts(torch.zeros(0, 5)).shape == (0, 5)
        assert exchange.part(torch.zeros(0, dtype=torch.bool)).to_tokens(torch.zeros(0, 5)).shape == (0, 5)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    check_layouts()
    check_fp8()
    dist.destroy_process_group()
