"""What a trained model does with text that it has not seen: losses, also with fewer experts, and its routing."""

from contextlib import contextmanager

import numpy
import torch
from megatron.core.transformer.moe.router import TopKRouter
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from megatron_moe_spec.metrics import normalized_mutual_information
from megatron_moe_spec.placement.halves import halves, tokens
from megatron_moe_spec.placement.measures import imbalance, measure
from megatron_moe_spec.placement.objectives import OBJECTIVES
from megatron_moe_spec.placement.placement import Cluster, contiguous
from megatron_moe_spec.placement.prefetch import cache_hits, predicted_hits, transition_scores
from megatron_moe_spec.traces.counts import loads, shuffled
from megatron_moe_spec.traces.schema import Trace

SEQUENCES_AT_A_TIME = 64
DEVICES = 4
CACHED_TOKENS = 5000


def evaluate(model, held_out, fewer=()) -> dict:
    """{measure: value} of a model on held-out text; its losses alone, where it has no experts.

    Args:
        held_out: path of ``held_out.npz``.
        fewer: numbers of experts a token, below the trained one, to evaluate with.
    """
    model.eval()
    file = numpy.load(held_out)
    tokens_SL, domains = torch.from_numpy(file["tokens"].astype(numpy.int64)), list(file["domains"])
    with recorded(model) as experts:
        losses_S = sequence_losses(model, tokens_SL)
    loss = float(losses_S.mean())
    found = {"validation_loss": loss}
    if len(domains) > 1:
        found |= {
            f"validation_loss_{name}": float(losses_S[i :: len(domains)].mean()) for i, name in enumerate(domains)
        }
    if not experts:
        return found
    for number in fewer:
        with experts_a_token(model, number):
            fewer_loss = float(sequence_losses(model, tokens_SL).mean())
        found |= {f"validation_loss_{number}_experts": fewer_loss, f"cost_of_{number}_experts": fewer_loss - loss}
    experts_TMK = torch.stack([torch.cat(parts) for parts in experts], dim=1).cpu()
    domain_T = (torch.arange(len(tokens_SL)) % len(domains)).repeat_interleave(tokens_SL.shape[1] - 1)
    num_experts = routers(model)[0].config.num_moe_experts
    return found | routing(experts_TMK, num_experts, tokens_SL.shape[1] - 1) | clusters(experts_TMK, domain_T)


def routers(model) -> list:
    """The routers of a model, in the order of layers."""
    return [module for module in model.modules() if isinstance(module, TopKRouter)]


@torch.no_grad()
def sequence_losses(model, tokens_SL: Tensor) -> Tensor:
    """[S] mean loss of each sequence."""
    length = tokens_SL.shape[1] - 1
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(diagonal=1).cuda()
    losses = []
    for part_SL in tokens_SL.split(SEQUENCES_AT_A_TIME):
        part_SL = part_SL.cuda()
        positions = torch.arange(length).expand(len(part_SL), -1).cuda()
        losses.append(model(part_SL[:, :-1].contiguous(), positions, mask, labels=part_SL[:, 1:].contiguous()))
    return torch.cat(losses).float().mean(dim=1).cpu()


@contextmanager
def experts_a_token(model, number: int):
    """Lets a model use fewer experts a token.

    Of routers whose probabilities are a softmax over the chosen experts: the remaining ones share all of it.
    """
    found = routers(model)
    config, trained = found[0].config, found[0].topk
    assert number < trained and config.moe_router_score_function == "softmax" and not config.moe_router_pre_softmax

    def use(top_k):
        config.moe_router_topk = top_k  # what dispatchers read
        for router in found:
            router.topk = top_k

    use(number)
    try:
        yield
    finally:
        use(trained)


@contextmanager
def recorded(model):
    """Gives a list for each router that fills with [T, K] of experts, the likeliest first; sequence by sequence."""
    found = routers(model)
    experts = [[] for _ in found]

    def hook(into, router, inputs, output):
        sequences = inputs[0].shape[1]
        probabilities_TE = output[0].reshape(-1, sequences, output[0].shape[-1]).transpose(0, 1).flatten(0, 1)
        into.append(probabilities_TE.topk(router.topk, dim=1).indices.short())

    handles = [
        router.register_forward_hook(lambda *call, into=into: hook(into, *call)) for router, into in zip(found, experts)
    ]
    try:
        yield experts
    finally:
        for handle in handles:
            handle.remove()


def routing(experts_TMK: Tensor, num_experts: int, length: int) -> dict:
    """Load, and what inference gains by the routing: see ``placement``. Fitted to one half, judged on the other.

    Args:
        experts_TMK: the likeliest first.
        length: of a sequence.
    """
    num_tokens, num_layers, top_k = experts_TMK.shape
    sequence_T = torch.arange(num_tokens, dtype=torch.int32) // length
    layers = tuple(range(num_layers))
    trace = Trace(experts_TMK.sort(dim=2).values, layers, num_experts, sequence_T // SEQUENCES_AT_A_TIME, sequence_T)
    fitted, judged = halves(trace)
    loads_ME = loads(trace)
    lru, lfu = cache_hits(tokens(judged, slice(0, CACHED_TOKENS)), max(top_k, num_experts // 4))
    cluster = Cluster(num_experts, DEVICES)
    devices = measure(OBJECTIVES["fanout"].place(fitted, cluster), judged).devices.mean()
    found = {
        "held_out_load_imbalance": imbalance(loads_ME).mean(),
        "held_out_dead_experts": (loads_ME == 0).double().mean(),
        "lru_hits": lru,
        "lfu_hits": lfu,
        "devices_a_token": devices,
        "devices_a_token_contiguous": measure(contiguous(cluster, layers), judged).devices.mean(),
    }
    for name, one in (("next_layer_hits", fitted), ("next_layer_hits_of_shuffled", shuffled(fitted))):
        found[name] = predicted_hits(transition_scores(one), judged, min(2 * top_k, num_experts))
    return {name: float(value) for name, value in found.items()}


def clusters(experts_TMK: Tensor, domain_T: Tensor) -> dict:
    """How well the likeliest experts of tokens tell their domains; means over layers. Nothing where there is one.

    ``matched_tokens`` is the share of tokens whose likeliest expert is the one assigned to their domain, by the best
    assignment of experts to domains.
    """
    num_domains, num_experts = int(domain_T.max()) + 1, int(experts_TMK.max()) + 1
    if num_domains == 1:
        return {}
    information, matched = [], []
    for expert_T in experts_TMK[:, :, 0].long().unbind(dim=1):
        joint = torch.bincount(domain_T * num_experts + expert_T, minlength=num_domains * num_experts)
        joint = joint.view(num_domains, num_experts).double()
        information.append(float(normalized_mutual_information(joint)))
        matched.append(float(joint[linear_sum_assignment(joint, maximize=True)].sum() / joint.sum()))
    return {"domain_information": sum(information) / len(information), "matched_tokens": sum(matched) / len(matched)}
