"""The auxiliary losses by autograd through the pure loss functions, on what plain forward hooks see.

Assembles every token's activations by Python loops over the routing map; shares nothing with the package's taps.
Import only after the CPU backend is enabled.
"""

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron_models import run_model

from megatron_moe_spec.losses import coupling_loss, specialization_loss
from megatron_moe_spec.losses.scores import normalized_scores


class Capture:
    """What one forward pass did in each MoE layer, with its autograd graph."""

    def __init__(self, model):
        self.layers = [
            m for name, m in model.named_modules() if isinstance(m, MoELayer) and "mtp" not in name
        ]
        self.seen = [{} for _ in self.layers]
        self.handles = []
        for layer, seen in zip(self.layers, self.seen):
            self._wrap_routing(layer.router, seen)
            experts = layer.experts
            many = hasattr(experts, "local_experts")
            modules = [e.linear_fc2 for e in experts.local_experts] if many else [experts.linear_fc2]
            for module in modules:
                self.handles.append(
                    module.register_forward_pre_hook(
                        lambda _, args, seen=seen: seen.setdefault("z", []).append(args[0])
                    )
                )

    def _wrap_routing(self, router, seen):
        original = router.routing

        def routing(logits, *args, **kwargs):
            probs, routing_map = original(logits, *args, **kwargs)
            seen.update(logits=logits, probs=probs, map=routing_map.clone())
            return probs, routing_map

        router.routing = routing

    def remove(self):
        for handle in self.handles:
            handle.remove()
        for layer in self.layers:
            del layer.router.routing


def pure_losses(capture: Capture, is_token, kind: str) -> tuple[list, list]:
    """Per-layer specialization losses and per-pair coupling losses of the captured forward pass.

    Args:
        is_token: [T] bool, False for padding, in the router's order of tokens.
    """
    specialization, scores, live_maps = [], [], []
    for layer, seen in zip(capture.layers, capture.seen):
        config = layer.config
        k = config.moe_router_topk
        dispatched, probs = seen["map"], seen["probs"]
        rows = torch.cat(seen["z"])
        position = 0
        where = {}
        for expert in range(dispatched.shape[1]):
            for token in dispatched[:, expert].nonzero().flatten().tolist():
                where[token, expert] = position
                position += 1
        assert position == len(rows)
        live = dispatched & (probs > 0)
        vectors, valid = [], []
        for token in is_token.nonzero().flatten().tolist():
            experts = live[token].nonzero().flatten().tolist()
            found = [rows[where[token, expert]] for expert in experts]
            missing = k - len(found)
            vectors.append(torch.stack(found + [torch.zeros_like(rows[0])] * missing))
            valid.append([True] * len(found) + [False] * missing)
        specialization.append(specialization_loss(torch.stack(vectors), torch.tensor(valid)))
        all_scores = normalized_scores(seen["logits"].reshape(-1, dispatched.shape[1]), config.moe_router_score_function)
        scores.append(all_scores[is_token])
        live_maps.append(live[is_token])
    pairs = []
    for i in range(len(scores) - 1):
        arguments = (
            dict(map=live_maps[i], map_next=live_maps[i + 1])
            if kind == "mass"
            else dict(top_k=capture.layers[0].config.moe_router_topk)
        )
        pairs.append(coupling_loss(scores[i], scores[i + 1], kind=kind, **arguments))
    return specialization, pairs


def reference_step(model, batches, specialization_coeff, coupling_coeff, kind) -> tuple[dict, dict]:
    """Gradients by name of the auxiliary losses alone, and their logged values."""
    for weight in model.parameters():
        weight.grad = None
    logged = {"specialization_loss": [], "coupling_loss": []}
    per_token = model.config.calculate_per_token_loss
    counts = [batch.get("padding_mask", torch.zeros_like(batch["tokens"], dtype=torch.bool)) for batch in batches]
    counts = [int((~mask).sum()) for mask in counts]
    for batch, count in zip(batches, counts):
        capture = Capture(model)
        output = run_model(model, batch)
        capture.remove()
        mask = batch.get("padding_mask", torch.zeros_like(batch["tokens"], dtype=torch.bool))
        specialization, pairs = pure_losses(capture, ~mask.T.reshape(-1), kind)
        logged["specialization_loss"] += specialization
        logged["coupling_loss"] += pairs
        weight = count / sum(counts) if per_token else 1.0 / len(batches)
        total = specialization_coeff * sum(specialization) + coupling_coeff * sum(pairs)
        (total * weight + 0.0 * output.sum()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    values = {name: float(torch.stack(v).detach().mean()) for name, v in logged.items() if v}
    return gradients, values
