"""The auxiliary losses by autograd through the pure loss functions, on what plain forward hooks see.

Assembles every token's activations by Python loops over the routing map; shares nothing with the package's taps.
Import only after the CPU backend is enabled.
"""

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron_models import run_model

from megatron_moe_spec import SpecConfig
from megatron_moe_spec.losses import coupling_loss, expert_router_coupling_loss, router_noise
from megatron_moe_spec.losses.base import ACTIVATIONS, EXPERT_WEIGHTS, OUTPUTS, PAIRS, ROUTER_WEIGHT, SCORES
from megatron_moe_spec.losses.scores import normalized_scores


class Capture:
    """Values of each MoE layer in one forward pass, with their autograd graph."""

    def __init__(self, model):
        self.layers = [m for name, m in model.named_modules() if isinstance(m, MoELayer) and "mtp" not in name]
        self.seen = [{} for _ in self.layers]
        self.handles = []
        for layer, seen in zip(self.layers, self.seen):
            self._wrap_routing(layer.router, seen)
            experts = layer.experts
            many = hasattr(experts, "local_experts")
            modules = [e.linear_fc2 for e in experts.local_experts] if many else [experts.linear_fc2]

            def see_rows(module, args, seen=seen, modules=modules):
                """What pads an expert's rows is left out."""
                counts = seen["counts"] if len(modules) == 1 else [seen["counts"][modules.index(module)]]
                splits = list(map(int, args[1])) if len(args) > 1 else [len(args[0])]
                parts = zip(args[0].split(splits), counts, strict=True)
                seen.setdefault("z", []).extend(part[:count] for part, count in parts)

            def see_experts(module, args, output, seen=seen):
                seen.update(p=args[2], y=output[0])

            def see_counts(module, args, seen=seen):
                seen["counts"] = list(map(int, args[1]))

            self.handles += [module.register_forward_pre_hook(see_rows) for module in modules]
            self.handles.append(experts.register_forward_pre_hook(see_counts))
            self.handles.append(experts.register_forward_hook(see_experts))

    def _wrap_routing(self, router, seen):
        original = router.routing

        def routing(logits, *args, **kwargs):
            probs, routing_map = original(logits, *args, **kwargs)
            seen.update(logits=logits, probs=probs, map=routing_map)
            return probs, routing_map

        router.routing = routing

    def remove(self):
        for handle in self.handles:
            handle.remove()
        for layer in self.layers:
            del layer.router.routing


def pure_losses(capture: Capture, is_token, config: SpecConfig) -> dict[str, list]:
    """Every loss of every layer, or pair of layers, of the captured forward pass, by log name.

    Args:
        is_token: [T] bool, False for padding, in the router's order of tokens.
    """
    values = {}
    layers = [
        _seen(layer, number, seen, is_token) for number, (layer, seen) in enumerate(zip(capture.layers, capture.seen))
    ]
    for loss in config.losses:
        if loss.name not in config.trained_losses:
            continue
        if loss.reads == PAIRS:
            values[loss.name] = [_of_pair(loss, this, following) for this, following in zip(layers, layers[1:])]
        else:
            values[loss.name] = [_OF_LAYER[loss.reads](loss, layer) for layer in layers]
    return values


def _seen(layer, number: int, seen: dict, is_token) -> dict:
    """Quantities of a layer that losses read, of the tokens that are not padding."""
    config, dispatched = layer.config, seen["map"]
    live = dispatched & (seen["probs"] > 0)
    # By autograd, what reaches p through rows that it weights, and through the division by it, adds up to nothing.
    p = seen["p"].where(seen["p"] > 0, torch.ones(())).unsqueeze(-1)
    weighted = {ACTIVATIONS: torch.cat(seen["z"]), OUTPUTS: seen["y"]}
    scores = normalized_scores(seen["logits"].reshape(-1, dispatched.shape[1]), config.moe_router_score_function)
    top_k = config.moe_router_topk
    vectors = {reads: by_token(rows / p, dispatched, live, is_token, top_k) for reads, rows in weighted.items()}
    return {"layer": layer, "number": number, "live": live[is_token], SCORES: scores[is_token], **vectors}


_OF_LAYER = {
    ACTIVATIONS: lambda loss, seen: loss.of_vectors("z", *seen[ACTIVATIONS]),
    OUTPUTS: lambda loss, seen: loss.of_vectors("x", *seen[OUTPUTS]),
    SCORES: lambda loss, seen: loss.of_scores(seen[SCORES], seen["live"]),
    ROUTER_WEIGHT: lambda loss, seen: loss.of_weight(seen["layer"].router.weight),
    EXPERT_WEIGHTS: lambda loss, seen: erc_of(seen["layer"], seen["number"], loss.alpha),
}


def _of_pair(loss, this: dict, following: dict):
    if loss.kind == "mass":
        return coupling_loss(this[SCORES], following[SCORES], this["live"], following["live"])
    top_k = this["layer"].config.moe_router_topk
    return coupling_loss(this[SCORES], following[SCORES], kind=loss.kind, top_k=top_k)


def by_token(rows, dispatched, live, is_token, k: int) -> tuple:
    """Rows sorted by (expert, token) -> each token's rows [T, k, :], and which of them are there."""
    where = {}
    for expert in range(dispatched.shape[1]):
        for token in dispatched[:, expert].nonzero().flatten().tolist():
            where[token, expert] = len(where)
    assert len(where) == len(rows)
    vectors, valid = [], []
    for token in is_token.nonzero().flatten().tolist():
        experts = live[token].nonzero().flatten().tolist()
        found = [rows[where[token, expert]] for expert in experts]
        missing = k - len(found)
        vectors.append(torch.stack(found + [torch.zeros_like(rows[0])] * missing))
        valid.append([True] * len(found) + [False] * missing)
    return torch.stack(vectors), torch.tensor(valid)


def erc_of(layer, number: int, alpha: float):
    """ERC of a layer in the first training step."""
    experts = layer.experts
    if hasattr(experts, "local_experts"):
        weights = [expert.linear_fc1.weight for expert in experts.local_experts]
    else:
        weights = [getattr(experts.linear_fc1, f"weight{i}") for i in range(layer.num_local_experts)]
    rows = len(weights[0])
    # Blocks of gate rows and of linear rows in turn; by default one of each.
    block = getattr(layer.config, "moe_mlp_glu_interleave_size", None) or rows // 2
    gate = torch.stack([weight[[row for row in range(rows) if row // block % 2 == 0]] for weight in weights])
    router = layer.router.weight
    return expert_router_coupling_loss(router, gate, alpha, router_noise(router, seed=number))


def reference_step(model, batches, config: SpecConfig) -> tuple[dict, dict]:
    """Gradients by name of the auxiliary losses alone, and their logged values."""
    for weight in model.parameters():
        weight.grad = None
    coefficients = {loss.name: loss.coeff for loss in config.losses}
    logged = {}
    per_token = model.config.calculate_per_token_loss
    counts = [batch.get("padding_mask", torch.zeros_like(batch["tokens"], dtype=torch.bool)) for batch in batches]
    counts = [int((~mask).sum()) for mask in counts]
    for batch, count in zip(batches, counts):
        capture = Capture(model)
        output = run_model(model, batch)
        capture.remove()
        mask = batch.get("padding_mask", torch.zeros_like(batch["tokens"], dtype=torch.bool))
        losses = pure_losses(capture, ~mask.T.reshape(-1), config)
        weight = count / sum(counts) if per_token else 1.0 / len(batches)
        total = sum(coefficients[name] * sum(values) for name, values in losses.items())
        (total * weight + 0.0 * output.sum()).backward()
        for name, values in losses.items():
            logged.setdefault(name, []).extend(value.detach() for value in values)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    values = {name: float(torch.stack(v).mean()) for name, v in logged.items() if v}
    return gradients, values
