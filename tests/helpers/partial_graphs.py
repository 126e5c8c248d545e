"""A CPU stand-in for Transformer Engine's CUDA graphs of parts of a layer; Megatron's own capture and replay run.

It stands for the contract of ``transformer_engine.pytorch.make_graphed_callables``, as Megatron's
``GraphableMegatronModule`` uses it: while a layer is captured its Python runs, with ``is_graph_capturing()``, on inputs
that belong to no micro-batch; the callable that replaces it then computes the same from other inputs and the present
weights, gives their gradients in backward, and runs no Python of the layer: no hook, no replaced method.

Import only after the CPU backend is enabled.
"""

import contextlib

import torch
from megatron.core.transformer import cuda_graphs
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig


def graph_settings(modules: list[str]) -> dict:
    """Fields of TransformerConfig for graphs over these parts of a layer; none: no graphs."""
    if not modules:
        return {}
    name = "cuda_graph_modules" if hasattr(TransformerConfig, "cuda_graph_modules") else "cuda_graph_scope"
    return {"cuda_graph_impl": "transformer_engine", name: list(modules)}


def capture(model, change=None) -> None:
    """Captures the layers of a model, which ``attach`` may have seen.

    Args:
        change: of the outputs of every graph of an MoE layer, list -> list; it makes the stand-in wrong.
    """
    graphed = []
    for layer in model.decoder.layers:
        hidden_states = torch.ones(4, 2, layer.config.hidden_size, dtype=layer.config.params_dtype, requires_grad=True)
        with _capturing():
            outputs = layer(hidden_states, attention_mask=None)
        (gradient,) = torch.autograd.grad(sum(x.sum() for x in outputs if x.requires_grad), hidden_states)
        assert gradient.isfinite().all()
        graphed.append((layer, _Graph(layer, change if isinstance(layer.mlp, MoELayer) else None)))
    for layer, graph in graphed:
        layer.cuda_graphs, layer.cuda_graph_manual_hooks = [graph], []
        # Without Transformer Engine; a mask of zeros would be added.
        layer._get_te_cuda_graph_replay_args = _replay_args


def _replay_args(*args, **kwargs) -> tuple:
    return args or (kwargs.pop("hidden_states"),), kwargs


@contextlib.contextmanager
def _capturing():
    cuda_graphs._set_capture_start()
    try:
        yield
    finally:
        cuda_graphs._set_capture_end()


class _Graph:
    def __init__(self, layer, change):
        self._layer, self._change = layer, change

    def __call__(self, *args, **kwargs) -> tuple:
        with _without_hooks(self._layer), _capturing():
            outputs = self._layer._te_cuda_graph_capture(*args, **kwargs)
        return outputs if self._change is None else tuple(self._change(list(outputs)))


@contextlib.contextmanager
def _without_hooks(layer):
    """No hook or replaced method of a layer's modules runs."""
    kept = []
    for module in layer.modules():
        replaced = {name: x for name, x in vars(module).items() if callable(getattr(type(module), name, None))}
        hooks = module._forward_pre_hooks.copy(), module._forward_hooks.copy()
        kept.append((module, replaced, hooks))
        for name in replaced:
            delattr(module, name)
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    try:
        yield
    finally:
        for module, replaced, (before, after) in kept:
            vars(module).update(replaced)
            module._forward_pre_hooks.update(before)
            module._forward_hooks.update(after)
