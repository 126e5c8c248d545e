"""Training loops and models around a model: checkpoints, orders of passes, adapters, models inside models.

Import only after the CPU backend is enabled.
"""

import copy
import gc

import torch
import torch.nn.functional as F
from loss_names import LOSS_NAMES, coefficients
from megatron_models import VOCABULARY
from reference import Capture, pure_losses
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron_moe_spec import SpecConfig
from megatron_moe_spec.integration.hooks import micro_batch as microbatch


def tokens_of(*lengths: int, seed: int = 1, size: int = 2) -> list[dict]:
    """A micro-batch of each length."""
    generator = torch.Generator().manual_seed(seed)
    return [{"tokens": torch.randint(0, VOCABULARY, (size, length), generator=generator)} for length in lengths]


def run(model, batch: dict):
    """``megatron_models.run_model`` for sequences of any length."""
    tokens = batch["tokens"]
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    extra = {"padding_mask": batch["padding_mask"]} if "padding_mask" in batch else {}
    return model(tokens, positions, None, labels=tokens.roll(-1, 1), **extra)


def gradients_of(model) -> dict:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def by_autograd(model, batches: list[dict], main_loss, kind: str, names=LOSS_NAMES) -> tuple[dict, dict]:
    """Gradients of ``main_loss(*outputs)`` and the losses of each micro-batch, all with coefficient 1; their means."""
    outputs, total, values = [], 0.0, {name: [] for name in names}
    for batch in batches:
        capture = Capture(model)
        outputs.append(run(model, batch))
        capture.remove()
        config = SpecConfig(coupling_type=kind, **coefficients(names))
        losses = pure_losses(capture, torch.ones(batch["tokens"].numel(), dtype=torch.bool), config)
        for name in names:
            total = total + sum(losses[name])
            values[name] += [float(loss) for loss in losses[name]]
    (main_loss(*outputs) + total).backward()
    return gradients_of(model), {name: sum(v) / len(v) for name, v in values.items()}


def worst_error(found: dict, expected: dict) -> float:
    """Largest relative error of a gradient; of one near zero, relative to a tenth of the largest."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    assert all(torch.isfinite(gradient).all() for gradient in found.values()), "a gradient is not finite"
    largest = max(float(gradient.norm()) for gradient in expected.values())
    assert largest > 1e-4, "there is no gradient to compare with"
    return max(
        float((found[name] - gradient).norm()) / (float(gradient.norm()) + 0.1 * largest)
        for name, gradient in expected.items()
    )


def assert_identical(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    different = [name for name, gradient in expected.items() if not torch.equal(found[name], gradient)]
    assert not different, f"worst error {worst_error(found, expected):.1e}, in {different}"


def micro_batches_alive() -> int:
    gc.collect()
    return sum(type(x) is microbatch.MicroBatch for x in gc.get_objects())


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, as of an average of weights, which shares the process groups: they cannot be copied."""
    group = torch.distributed.ProcessGroup
    group.__deepcopy__ = lambda self, memo: self
    try:
        return copy.deepcopy(model)
    finally:
        del group.__deepcopy__


def checkpoint_layers(model, use_reentrant: bool = True, part: str = "") -> None:
    """torch's checkpoint around each decoder layer, or around a part of it, from outside of the model."""
    for layer in model.decoder.layers:
        module = getattr(layer, part) if part else layer

        def forward(hidden_states, *args, _forward=module.forward, **kwargs):
            return checkpoint(lambda x: _forward(x, *args, **kwargs), hidden_states, use_reentrant=use_reentrant)

        module.forward = forward


def checkpointed_run(model, batch: dict, use_reentrant: bool = True):
    """A checkpoint around the whole forward pass."""
    anchor = torch.zeros((), requires_grad=True)
    return checkpoint(lambda x: run(model, batch) + x, anchor, use_reentrant=use_reentrant)


# How outputs come to be trained on: (forward, chosen, rejected, another) -> what is kept until the next step.


def chosen_and_rejected(chosen, rejected):
    return 0.5 * chosen.mean() - 0.3 * rejected.mean()


def preference(chosen, rejected):
    return F.softplus(chosen.mean() - rejected.mean())


def one_backward(forward, chosen, rejected, another):
    chosen_and_rejected(forward(chosen), forward(rejected)).backward()


def one_preference_backward(forward, chosen, rejected, another):
    preference(forward(chosen), forward(rejected)).backward()


def first_in_first_out(forward, chosen, rejected, another):
    first, second = forward(chosen), forward(rejected)
    (0.5 * first.mean()).backward()
    (-0.3 * second.mean()).backward()


def last_in_first_out(forward, chosen, rejected, another):
    first, second = forward(chosen), forward(rejected)
    (-0.3 * second.mean()).backward()
    (0.5 * first.mean()).backward()


def kept_between(forward, chosen, rejected, another):
    first, kept, second = forward(chosen), forward(another), forward(rejected)
    chosen_and_rejected(first, second).backward()
    return kept


def dropped_before(forward, chosen, rejected, another):
    dropped = forward(another)
    del dropped
    one_backward(forward, chosen, rejected, another)


def dropped_between(forward, chosen, rejected, another):
    first, dropped, second = forward(chosen), forward(another), forward(rejected)
    (-0.3 * second.mean()).backward()
    del dropped
    (0.5 * first.mean()).backward()


def all_of_it(forward, chosen, rejected, another):
    """Each of these disturbances in one step."""
    first, dropped, kept, second = (forward(batch) for batch in (chosen, another, another, rejected))
    (-0.3 * second.mean()).backward()
    del dropped
    (0.5 * first.mean()).backward()
    return kept


class Distilled(nn.Module):
    """A student with a frozen teacher beside it."""

    def __init__(self, student, teacher, first: str, runs: str = "before", teacher_trains: bool = False):
        super().__init__()
        self.config, self.model_type = student.config, None
        models = dict(student=student, teacher=teacher.requires_grad_(False))
        for name in (first, *(models.keys() - {first})):
            setattr(self, name, models[name])
        self._runs, self._teacher_trains = runs, teacher_trains

    def set_input_tensor(self, x) -> None:
        self.student.set_input_tensor(x)

    def forward(self, *args, **kwargs):
        self.teacher.train(self._teacher_trains)
        if self._runs == "before":
            self._run_teacher(*args, **kwargs)
        output = self.student(*args, **kwargs)
        if self._runs == "after":
            self._run_teacher(*args, **kwargs)
        return output

    def _run_teacher(self, *args, **kwargs) -> None:
        with torch.no_grad():
            self.teacher(*args, **kwargs)


class Adapter(nn.Module):
    """A low-rank addition to a linear layer or a router, which it calls under ``attribute``."""

    def __init__(self, wrapped: nn.Module, attribute: str, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self._attribute = attribute
        setattr(self, attribute, wrapped.requires_grad_(False))
        outputs, inputs = wrapped.weight.shape
        self.down = nn.Parameter(torch.randn(2, inputs, generator=generator) * 0.2)
        self.up = nn.Parameter(torch.randn(outputs, 2, generator=generator) * 0.2)

    @property
    def wrapped(self) -> nn.Module:
        return getattr(self, self._attribute)


class LinearAdapter(Adapter):
    def forward(self, x):
        output, bias = self.wrapped(x)
        return output + x @ self.down.T @ self.up.T, bias


class RouterAdapter(Adapter):
    """Computes the logits itself and leaves the rest to the router, as Megatron-Bridge's."""

    def forward(self, x, *args, **kwargs):
        logits = self.wrapped.gating(self.wrapped.apply_input_jitter(x))
        return self.wrapped.routing(logits + (x @ self.down.T @ self.up.T).to(logits.dtype), *args, **kwargs)


def adapt(model, names, attribute: str = "to_wrap") -> None:
    """Puts adapters around the modules of these names: "router", "linear_fc1", "linear_fc2" of experts."""
    for seed, (owner, name) in enumerate(_to_adapt(model, names)):
        kind = RouterAdapter if name == "router" else LinearAdapter
        setattr(owner, name, kind(getattr(owner, name), attribute, seed))


def merge(model, names) -> None:
    """Gives a model without adapters the weights that ``adapt`` amounts to."""
    for seed, (owner, name) in enumerate(_to_adapt(model, names)):
        module = getattr(owner, name)
        trains = module.weight.requires_grad
        adapter = Adapter(module, "to_wrap", seed)
        with torch.no_grad():
            module.weight += adapter.up @ adapter.down
        module.weight.requires_grad_(trains)


def of_adapters(gradients: dict, model, attribute: str) -> dict:
    """The gradients of what an adapted model trains, given those of the merged one."""
    adapters = {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}
    merged = {f"{name}.weight": module for name, module in adapters.items()}
    found = {name: gradient for name, gradient in gradients.items() if name not in merged}
    for name, adapter in adapters.items():
        gradient = gradients[f"{name}.weight"]
        found[f"{name}.up"] = gradient @ adapter.down.detach().T
        found[f"{name}.down"] = adapter.up.detach().T @ gradient
    return found


def _to_adapt(model, names) -> list:
    layers = [layer.mlp for layer in model.decoder.layers]
    owners = [(layer, "router") for layer in layers if "router" in names]
    experts = [expert for layer in layers for expert in layer.experts.local_experts]
    return owners + [(expert, name) for expert in experts for name in names if name != "router"]


class PackedAttention(nn.Module):
    """Causal core attention in torch, within each packed sequence."""

    def __init__(self, config, *args, **kwargs):
        super().__init__()

    def forward(self, query, key, value, mask, attn_mask_type=None, attention_bias=None, packed_seq_params=None, **_):
        if packed_seq_params is None:  # [s, b, h, d]
            output = _causal(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))
            return output.permute(2, 0, 1, 3).flatten(2)
        ends = packed_seq_params.cu_seqlens_q.tolist()
        flat = [x.reshape(-1, *x.shape[-2:]) for x in (query, key, value)]  # [t, h, d]
        outputs = [_causal(*(x[a:b].transpose(0, 1)[None] for x in flat))[0] for a, b in zip(ends, ends[1:])]
        return torch.cat([output.transpose(0, 1) for output in outputs]).flatten(1).unsqueeze(1)


def _causal(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def run_packed(model, batches: list[dict]):
    """One forward pass on sequences laid end to end."""
    from megatron.core.packed_seq_params import PackedSeqParams

    sequences = [batch["tokens"] for batch in batches]
    lengths = [sequence.shape[1] for sequence in sequences]
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    params = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths)
    )
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    labels = torch.cat([sequence.roll(-1, 1) for sequence in sequences], 1)
    return model(torch.cat(sequences, 1), positions, None, labels=labels, packed_seq_params=params)


def use_packed_attention(monkeypatch) -> None:
    import megatron.core.models.backends as backends

    monkeypatch.setattr(backends.LocalSpecProvider, "core_attention", lambda self: PackedAttention)
