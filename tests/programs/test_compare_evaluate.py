"""What is measured on held-out text, on small real models and traces of known routing."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("scipy", reason="scipy is not installed")

NUM_SEQUENCES, AT_A_TIME = 5, 2
TOP_K = 3


@pytest.fixture
def evaluation(megatron, monkeypatch):
    """The module, whose parts of sequences are small and of unequal sizes."""
    from examples.compare import evaluate

    monkeypatch.setattr(evaluate, "SEQUENCES_AT_A_TIME", AT_A_TIME)
    return evaluate


@pytest.fixture
def build(mm):
    def build(**settings):
        return mm.build_model(**{"moe_router_topk": TOP_K, **settings}).eval()

    return build


def held_out(mm, number=NUM_SEQUENCES):
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, mm.VOCABULARY, (number, mm.SEQUENCE + 1), generator=generator)


def moe_layers(model):
    return [layer.mlp for layer in model.decoder.layers]


@torch.no_grad()
def logits_of(model, tokens):
    """[vocabulary] of the last of a list of tokens, alone in a batch."""
    tokens = torch.tensor([tokens])
    return model(tokens, torch.arange(tokens.shape[1])[None], None)[0, -1]


# Losses


def test_losses_of_sequences_are_cross_entropies_token_by_token(mm, evaluation, build):
    model, tokens_SL = build(), held_out(mm)
    expected = []
    for tokens in tokens_SL.tolist():
        # From what stands before a token alone, so nothing that comes after is seen.
        losses = [-F.log_softmax(logits_of(model, tokens[:n]), dim=0)[tokens[n]] for n in range(1, len(tokens))]
        assert len(losses) == mm.SEQUENCE
        expected.append(torch.stack(losses).mean())
    found = evaluation.sequence_losses(model, tokens_SL)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-6)
    assert not found.requires_grad


# Fewer experts


def swiglu(mlp, x):
    gate, up = (mlp.linear_fc1.weight @ x).chunk(2)
    return mlp.linear_fc2.weight @ (F.silu(gate) * up)


def layer_output(layer, x, number):
    """Of one token: its likeliest experts share all of the probability."""
    logits = layer.router.weight @ x
    experts = logits.argsort(descending=True)[:number].tolist()
    probabilities = torch.softmax(logits[experts], dim=0)
    output = sum(p * swiglu(layer.experts.local_experts[e], x) for p, e in zip(probabilities, experts))
    return output + swiglu(layer.shared_experts, x) if layer.shared_experts is not None else output


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize(
    "settings",
    [{}, dict(moe_shared_expert_intermediate_size=16), dict(moe_token_dispatcher_type="allgather")],
    ids=["alltoall", "shared expert", "allgather"],
)
@torch.no_grad()
def test_fewer_experts_are_the_likeliest_ones_and_share_all_of_the_probability(mm, evaluation, build, settings, number):
    model, seen = build(**settings), []
    for layer in moe_layers(model):
        # Copies: the residual is added in place.
        layer.register_forward_hook(lambda *call: seen.append((call[0], call[1][0].clone(), call[2][0].clone())))
    with evaluation.experts_a_token(model, number):
        evaluation.sequence_losses(model, held_out(mm, 2))
    assert len(seen) == 3
    for layer, inputs, outputs in seen:
        inputs, outputs = inputs.flatten(0, 1), outputs.flatten(0, 1)
        expected = torch.stack([layer_output(layer, x, number) for x in inputs])
        torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)


def test_with_fewer_experts_a_model_is_the_one_that_was_built_so(mm, evaluation, build):
    model, tokens_SL = build(), held_out(mm)
    with evaluation.experts_a_token(model, 2), evaluation.recorded(model) as experts:
        found = evaluation.sequence_losses(model, tokens_SL)
    assert torch.equal(found, evaluation.sequence_losses(build(moe_router_topk=2), tokens_SL))
    assert {part.shape[1] for parts in experts for part in parts} == {2}


@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_a_model_uses_as_many_experts_as_before(mm, evaluation, build, fails):
    model, tokens_SL = build(), held_out(mm)
    before = evaluation.sequence_losses(model, tokens_SL)
    try:
        with evaluation.experts_a_token(model, 1):
            assert model.config.moe_router_topk == 1
            assert not torch.equal(evaluation.sequence_losses(model, tokens_SL), before)
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert model.config.moe_router_topk == TOP_K and [r.topk for r in evaluation.routers(model)] == [TOP_K] * 3
    assert torch.equal(evaluation.sequence_losses(model, tokens_SL), before)


def test_experts_not_fewer_and_probabilities_that_would_not_sum_to_1_are_refused(evaluation, build):
    for model, number in ((build(), TOP_K), (build(), TOP_K + 1), (build(moe_router_pre_softmax=True), 1)):
        with pytest.raises(AssertionError), evaluation.experts_a_token(model, number):
            pass
        assert model.config.moe_router_topk == TOP_K


# Recording


@torch.no_grad()
def test_recorded_experts_are_the_likeliest_ones_of_each_token_sequence_by_sequence(mm, evaluation, build):
    model, tokens_SL = build(), held_out(mm)
    with evaluation.recorded(model) as experts:
        evaluation.sequence_losses(model, tokens_SL)
    sizes = [AT_A_TIME * mm.SEQUENCE, AT_A_TIME * mm.SEQUENCE, mm.SEQUENCE]
    assert [[len(part) for part in parts] for parts in experts] == [sizes] * 3

    inputs = [[] for _ in experts]
    for into, router in zip(inputs, evaluation.routers(model)):
        router.register_forward_pre_hook(lambda router, args, into=into: into.append(args[0]))
    for sequence in tokens_SL.split(1):  # a batch of one has one order
        evaluation.sequence_losses(model, sequence)
    for layer, (parts, seen) in enumerate(zip(experts, inputs)):
        recorded = torch.cat(parts)
        assert recorded.dtype == torch.int16
        weight = moe_layers(model)[layer].router.weight
        expected = [(weight @ x).argsort(descending=True)[:TOP_K] for x in torch.cat(seen).flatten(0, 1)]
        assert recorded.tolist() == torch.stack(expected).tolist()
        # A record of the tokens in another order would be another one.
        swapped = torch.cat([part.unflatten(0, (mm.SEQUENCE, -1)).transpose(0, 1).flatten(0, 1) for part in parts])
        assert recorded.tolist() != swapped.tolist()


def test_nothing_is_recorded_afterwards(mm, evaluation, build):
    model = build()
    with pytest.raises(KeyError), evaluation.recorded(model) as experts:
        raise KeyError
    evaluation.sequence_losses(model, held_out(mm))
    assert experts == [[], [], []]
    assert not any(router._forward_hooks for router in evaluation.routers(model))


# The whole


@pytest.fixture
def file(mm, tmp_path):
    import numpy

    tokens, domains = held_out(mm, 8), numpy.array(["here", "there"])
    numpy.savez(tmp_path / "held_out.npz", tokens=tokens.numpy(), domains=domains)
    return tmp_path / "held_out.npz"


def test_evaluation_of_a_model_with_experts(mm, evaluation, build, file):
    from megatron_moe_spec import SpecConfig, attach

    model, tokens_SL = build(), held_out(mm, 8)
    attach(model, SpecConfig(specialization_loss_coeff=1.0, coupling_loss_coeff=1.0, metrics_interval=1))
    model.train()
    found = evaluation.evaluate(model, file, fewer=(2, 1))
    losses_S = evaluation.sequence_losses(build(), tokens_SL)
    assert found["validation_loss"] == pytest.approx(float(losses_S.mean()))
    assert found["validation_loss_here"] == pytest.approx(float(losses_S[[0, 2, 4, 6]].mean()))
    assert found["validation_loss_there"] == pytest.approx(float(losses_S[[1, 3, 5, 7]].mean()))
    two = float(evaluation.sequence_losses(build(moe_router_topk=2), tokens_SL).mean())
    assert found["validation_loss_2_experts"] == pytest.approx(two)
    assert found["cost_of_2_experts"] == pytest.approx(two - float(losses_S.mean()), abs=1e-6)
    assert found["cost_of_1_experts"] == found["validation_loss_1_experts"] - found["validation_loss"]

    with evaluation.recorded(model) as experts:
        evaluation.sequence_losses(model, tokens_SL)
    experts_TMK = torch.stack([torch.cat(parts) for parts in experts], dim=1)
    domain_T = torch.tensor([s % 2 for s in range(8) for _ in range(mm.SEQUENCE)])
    expected = evaluation.routing(experts_TMK, 4, mm.SEQUENCE) | evaluation.clusters(experts_TMK, domain_T)
    assert len(expected) == 10 and expected.items() <= found.items()
    assert all(isinstance(value, float) for value in found.values())


def test_evaluation_of_a_dense_model_is_its_losses(mm, evaluation, build, file):
    model = build(num_moe_experts=None, moe_ffn_hidden_size=None)
    found = evaluation.evaluate(model, file)
    assert set(found) == {"validation_loss", "validation_loss_here", "validation_loss_there"}
    assert found["validation_loss"] == pytest.approx(float(evaluation.sequence_losses(model, held_out(mm, 8)).mean()))


# Routing of traces. Tokens choose experts evenly, if nothing else is said.


def random_experts(num_tokens, num_layers, top_k, num_experts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_tokens, num_layers, num_experts, generator=generator)
    return scores.topk(top_k, dim=2).indices.short()


def test_loads_and_dead_experts_by_counting(evaluation):
    experts_TMK = random_experts(400, 3, 2, 16)
    experts_TMK[:, 1][experts_TMK[:, 1] == 5] = 6  # at worst twice in a token
    experts_TMK[:, 2] = experts_TMK[:, 2] // 4  # four of sixteen
    found = evaluation.routing(experts_TMK, 16, length=20)
    imbalances, dead = [], 0
    for layer in range(3):
        counts = Counter(experts_TMK[:, layer].flatten().tolist())
        imbalances.append(max(counts.values()) / (800 / 16))
        dead += 16 - len(counts)
    assert dead == 1 + 12
    assert found["held_out_load_imbalance"] == pytest.approx(sum(imbalances) / 3)
    assert found["held_out_dead_experts"] == pytest.approx(dead / 48)


def test_routing_does_not_depend_on_the_order_of_a_tokens_experts(evaluation):
    experts_TMK = random_experts(400, 3, 4, 16)
    found = evaluation.routing(experts_TMK, 16, length=20)
    assert found == evaluation.routing(experts_TMK.flip(2), 16, length=20)
    assert set(found) == {
        "held_out_load_imbalance", "held_out_dead_experts", "lru_hits", "lfu_hits", "devices_a_token",
        "devices_a_token_contiguous", "next_layer_hits", "next_layer_hits_of_shuffled",
    }  # fmt: skip


def test_next_layer_is_predicted_where_it_follows_from_this_one(evaluation):
    experts_TMK = random_experts(4000, 3, 2, 64)
    independent = evaluation.routing(experts_TMK, 64, length=20)
    for layer in (1, 2):
        order = torch.randperm(64, generator=torch.Generator().manual_seed(layer)).short()
        experts_TMK[:, layer] = order[experts_TMK[:, layer - 1].long()]
    found = evaluation.routing(experts_TMK, 64, length=20)
    chance = 2 * 2 / 64  # four are predicted
    assert found["next_layer_hits"] > 0.999
    assert found["next_layer_hits_of_shuffled"] == pytest.approx(chance, abs=0.03)
    assert independent["next_layer_hits"] == pytest.approx(chance, abs=0.03)


def test_devices_and_cache_of_experts_that_go_together(evaluation):
    """Experts e and e + 4 of eight serve the same tokens: one device of four would do, neighbours need two."""
    first_TM = random_experts(2000, 2, 1, 4)
    found = evaluation.routing(torch.cat([first_TM, first_TM + 4], dim=2), 8, length=20)
    assert found["devices_a_token"] == 1 and found["devices_a_token_contiguous"] == 2
    # Two slots, which hold the experts of the token before: a pair of four.
    assert found["lru_hits"] == pytest.approx(1 / 4, abs=0.03)
    assert evaluation.routing(first_TM[:1].expand(2000, -1, -1) + torch.tensor([0, 4]), 8, 20)["lru_hits"] > 0.99


# Clusters


def labelled(num_tokens, num_domains, seed=0):
    return torch.randint(num_domains, (num_tokens,), generator=torch.Generator().manual_seed(seed))


def test_an_expert_for_each_domain_is_a_perfect_match(evaluation):
    domain_T = labelled(3000, 4)
    order = torch.tensor([5, 0, 7, 2])
    experts_TMK = torch.stack([order[domain_T], order.flip(0)[domain_T]], dim=1)[:, :, None]
    experts_TMK = torch.cat([experts_TMK, random_experts(3000, 2, 1, 8)], dim=2).short()
    assert evaluation.clusters(experts_TMK, domain_T) == pytest.approx({"domain_information": 1, "matched_tokens": 1})
    # Only the likeliest expert counts.
    assert evaluation.clusters(experts_TMK.flip(2), domain_T)["domain_information"] < 0.01


def test_experts_by_chance_match_by_chance(evaluation):
    found = evaluation.clusters(random_experts(20000, 2, 2, 8), labelled(20000, 8))
    assert found["domain_information"] < 0.005
    assert 1 / 8 < found["matched_tokens"] < 1.1 / 8


def test_matched_tokens_by_all_assignments_and_information_by_its_definition(evaluation):
    import itertools
    import math

    domain_T = labelled(500, 3)
    experts_TMK = random_experts(500, 2, 1, 4)
    experts_TMK[:200, 0, 0] = domain_T[:200].short()  # some information
    matched, information = [], []
    for layer in range(2):
        pairs = list(zip(domain_T.tolist(), experts_TMK[:, layer, 0].tolist()))
        hits = [sum(order[d] == e for d, e in pairs) for order in itertools.permutations(range(4), 3)]
        matched.append(max(hits) / 500)

        def entropy(values):
            return -sum(n / 500 * math.log(n / 500) for n in Counter(values).values())

        separate = entropy([d for d, _ in pairs]) + entropy([e for _, e in pairs])
        information.append(2 * (separate - entropy(pairs)) / separate)
    found = evaluation.clusters(experts_TMK, domain_T)
    assert found["matched_tokens"] == pytest.approx(sum(matched) / 2)
    assert found["domain_information"] == pytest.approx(sum(information) / 2)


def test_numbers_of_experts_do_not_matter(evaluation):
    domain_T, experts_TMK = labelled(500, 3), random_experts(500, 2, 2, 8)
    experts_TMK[:200, :, 0] = domain_T[:200, None].short()
    order = torch.tensor([3, 7, 1, 0, 6, 2, 5, 4]).short()
    found = evaluation.clusters(order[experts_TMK.long()], domain_T)
    assert found == pytest.approx(evaluation.clusters(experts_TMK, domain_T))


def test_one_domain_has_no_clusters(evaluation):
    assert evaluation.clusters(random_experts(100, 2, 2, 8), torch.zeros(100, dtype=torch.int64)) == {}
