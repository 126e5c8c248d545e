"""The fused router: scores, the choice of experts, and the load-balancing loss."""

import torch
from torch.nn.functional import softplus

from .registry import bound, refuse


def _scores(logits, score_function):
    x = logits.float()
    if score_function == "softmax":
        return x.softmax(dim=-1)
    return x.sigmoid() if score_function == "sigmoid" else softplus(x).sqrt()


def _normalized(scores, topk, score_function):
    if score_function == "softmax" or topk == 1:
        return scores
    return scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)


def _choose(choice, topk, num_groups=None, group_topk=None):
    """The map [tokens, experts] of the largest; with groups, those of ``group_topk`` groups alone."""
    if group_topk:
        groups = choice.view(len(choice), num_groups, -1)
        of_groups = groups.topk(topk // group_topk, dim=-1).values.sum(dim=-1)
        kept = torch.zeros_like(of_groups, dtype=torch.bool)
        kept.scatter_(1, of_groups.topk(group_topk, dim=-1).indices, True)
        choice = groups.masked_fill(~kept.unsqueeze(-1), float("-inf")).view_as(choice)
    return torch.zeros_like(choice, dtype=torch.bool).scatter_(1, choice.topk(topk, dim=-1).indices, True)


def _probs(logits, map, topk, use_pre_softmax, scaling_factor, score_function):
    """Of a given choice, as a differentiable function of the logits."""
    if score_function == "softmax" and not use_pre_softmax:
        probs = logits.masked_fill(~map, float("-inf")).softmax(dim=-1)
    else:
        probs = _normalized(torch.where(map, _scores(logits, score_function), 0.0), topk, score_function)
    return probs * (scaling_factor or 1.0)


@torch.enable_grad()
def _gradient(function, logits, incoming):
    x = logits.detach().requires_grad_()
    return torch.autograd.grad(function(x), x, incoming.float().view_as(x))[0]


@bound
def fused_topk_with_score_function_fwd(
    logits, topk, use_pre_softmax, num_groups, group_topk, scaling_factor, score_function, expert_bias,
    routing_map_format=0, topk_indices=None,
):  # fmt: skip
    refuse((int(routing_map_format) != 0, "routing map of bits"), (topk_indices is not None, "dense indices"))
    x = logits.float().reshape(-1, logits.shape[-1])
    choice = x if score_function == "softmax" and not use_pre_softmax else _scores(x, score_function)
    map = _choose(choice if expert_bias is None else choice + expert_bias, topk, num_groups, group_topk)
    probs = _probs(x, map, topk, use_pre_softmax, scaling_factor, score_function)
    return probs.to(logits.dtype).view_as(logits), map.view(logits.shape), x.clone()


@bound
def fused_topk_with_score_function_bwd(
    routing_map, intermediate_output, grad_probs, grad_logits, topk, use_pre_softmax, scaling_factor, score_function,
    use_dense_indices=False, routing_map_format=0,
):  # fmt: skip
    map = routing_map.reshape(intermediate_output.shape)
    gradient = _gradient(
        lambda x: _probs(x, map, topk, use_pre_softmax, scaling_factor, score_function), intermediate_output, grad_probs
    )
    grad_logits.copy_(gradient.view_as(grad_logits))


@bound
def fused_score_for_moe_aux_loss_fwd(logits, topk, score_function, routing_map_format=0):
    scores = _normalized(_scores(logits, score_function), topk, score_function)
    return scores, _choose(scores, topk), logits.float().clone()


@bound
def fused_score_for_moe_aux_loss_bwd(intermediate_output, grad_scores, grad_logits, topk, score_function):
    def scores(x):
        return _normalized(_scores(x, score_function), topk, score_function)

    grad_logits.copy_(_gradient(scores, intermediate_output, grad_scores))


@bound
def fused_moe_aux_loss_fwd(probs, tokens_per_expert, total_num_tokens, num_experts, num_rows, num_cols, topk, coeff):
    factor = num_experts * coeff / (topk * float(total_num_tokens) ** 2)
    loss = (probs.float().sum(dim=0) * tokens_per_expert.float()).sum() * factor
    return loss.to(probs.dtype), torch.tensor([factor, 0.0])


@bound
def fused_moe_aux_loss_fwd_graph_safe(
    probs, tokens_per_expert, total_num_tokens, num_experts, num_rows, num_cols, topk, coeff
):
    total = int(total_num_tokens)
    return fused_moe_aux_loss_fwd(probs, tokens_per_expert, total, num_experts, num_rows, num_cols, topk, coeff)


@bound
def fused_moe_aux_loss_bwd(Const_buf, tokens_per_expert, num_rows, num_cols, grad_aux_loss):
    row = tokens_per_expert.float() * Const_buf[0] * grad_aux_loss.float()
    return row.expand(num_rows, num_cols).to(grad_aux_loss.dtype).contiguous()
