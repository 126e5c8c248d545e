"""Recipes of docs/frameworks.md, run over stand-ins of the frameworks; the order of attaching and adapting."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from processes import ROOT
from torch import nn

from megatron_moe_spec import SpecConfig, attach
from megatron_moe_spec.metrics.writer import METRICS_FILE

BOTH = SpecConfig(specialization_loss_coeff=1.0, coupling_loss_coeff=1.0)


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter beside it, as Megatron-Bridge's ``LoRALinear``: it calls the layer."""

    def __init__(self, to_wrap: nn.Module, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.to_wrap = to_wrap.requires_grad_(False)
        outputs, inputs = to_wrap.weight.shape
        self.down = nn.Parameter(torch.randn(2, inputs, generator=generator))
        self.up = nn.Parameter(torch.randn(outputs, 2, generator=generator))

    def forward(self, x):
        output, bias = self.to_wrap(x)
        return output + x @ self.down.T @ self.up.T, bias


def _adapt(model, names) -> None:
    seed = 0
    for _, experts in model.named_modules():
        for expert in getattr(experts, "local_experts", ()):
            for name in names:
                setattr(expert, name, Adapted(getattr(expert, name), seed))
                seed += 1


def _replay_routing(monkeypatch) -> None:
    """As frameworks replay the routing of a rollout: the class's method is replaced, and decides for other experts."""
    from megatron.core.transformer.moe.router import TopKRouter

    decide = TopKRouter.routing

    def routing(router, logits, *args, **kwargs):
        _, routing_map = decide(router, logits, *args, **kwargs)
        replayed = routing_map.roll(1, dims=1)
        scores = logits.reshape(-1, logits.shape[-1]).masked_fill(~replayed, float("-inf"))
        return scores.softmax(dim=1), replayed

    monkeypatch.setattr(TopKRouter, "routing", routing)


def test_routing_replay_before_and_after(megatron, monkeypatch):
    import megatron_models

    results = []
    for order in ("plain", "attach, replay", "replay, attach"):
        model = megatron_models.build_model()
        with monkeypatch.context() as patch:
            if order == "replay, attach":
                _replay_routing(patch)
            handle = attach(model, BOTH)
            if order == "attach, replay":
                _replay_routing(patch)
            gradients = megatron_models.train_step(model, megatron_models.micro_batches(2), main_loss_weight=1.0)
        results.append((gradients, handle.end_step()))
    (_, plain), (first, first_values), (last, last_values) = results
    assert first_values == last_values
    assert abs(first_values["coupling_loss"] / plain["coupling_loss"] - 1.0) > 0.01
    assert all(torch.equal(first[name], last[name]) for name in last)


@pytest.mark.parametrize("adapted", [("linear_fc2",), ("linear_fc1", "linear_fc2")])
def test_adapters_before_and_after(megatron, adapted):
    import megatron_models

    results = []
    for order in ("plain", "attach, adapt", "adapt, attach"):
        model = megatron_models.build_model()
        handle = attach(model, BOTH) if order == "attach, adapt" else None
        _adapt(model, adapted)
        if order == "adapt, attach":
            handle = attach(model, BOTH)
        gradients = megatron_models.train_step(model, megatron_models.micro_batches(2), main_loss_weight=1.0)
        results.append((gradients, handle and handle.end_step()))
    (plain, _), (first, first_values), (last, last_values) = results
    assert first_values == last_values and first_values["specialization_loss"] > 0
    assert first.keys() == last.keys()
    for name in first:  # Sums of the same terms in another order.
        torch.testing.assert_close(first[name], last[name], rtol=1e-4, atol=1e-5 * float(last[name].abs().max()))
    routers = [name for name in first if name.endswith("router.weight")]
    experts = [name for name in first if ".linear_fc1." in name]
    assert routers and experts
    for name in (*routers, *experts):
        assert float((first[name] - plain[name]).norm()) > 1e-2 * float(plain[name].norm()), name


def test_hook_before_ddp_gets_a_list_of_chunks(megatron):
    """Megatron-Bridge's hooks take and return the list; Megatron's DDP comes afterwards, in ``train_step``."""
    import megatron_models

    batches = megatron_models.micro_batches(2)
    alone = megatron_models.build_model()
    attach(alone, BOTH)
    listed = megatron_models.build_model()
    attach([listed], BOTH)
    moduled = megatron_models.build_model()
    attach(nn.ModuleList([moduled]), BOTH)  # NeMo's MegatronParallel
    expected = megatron_models.train_step(alone, batches)
    for model in (listed, moduled):
        found = megatron_models.train_step(model, batches)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "frameworks.md").read_text(), re.S)


def _recipe(number: int, **scope) -> dict:
    """What a block of docs/frameworks.md defines, run after the first one, with metrics in every second step."""
    exec(BLOCKS[0], scope)
    assert scope["spec"].enabled
    scope["spec"] = dataclasses.replace(scope["spec"], metrics_interval=2)
    exec(compile(BLOCKS[number], f"docs/frameworks.md, block {number}", "exec"), scope)
    return scope


def _lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


class Scalars:
    """TensorBoard's writer and W&B's run."""

    def __init__(self):
        self.tags, self.rows = {}, {}

    def add_scalar(self, tag, value, iteration):
        self.tags.setdefault(iteration, {})[tag] = value

    def log(self, values, iteration):
        self.rows[iteration] = values


class Bridge:
    """Megatron-Bridge's ``pretrain``: its callbacks, as CallbackManager finds and ``train`` calls them (067f987df)."""

    EVENTS = ("on_train_start", "on_train_step_start", "on_train_step_end", "on_train_end")

    def __init__(self, mm, folder: Path, step: int = 0, skipped: tuple[int, ...] = ()):
        self.model, self.batch = mm.build_model(), mm.micro_batches(1)[0]
        self.run_model, self.skipped, self.logged = mm.run_model, skipped, {}
        self.loggers = Scalars(), Scalars()
        self.state = SimpleNamespace(
            cfg=SimpleNamespace(
                logger=SimpleNamespace(tensorboard_dir=None), checkpoint=SimpleNamespace(save=str(folder))
            ),
            train_state=SimpleNamespace(step=step),
            tensorboard_logger=self.loggers[0],
            wandb_logger=self.loggers[1],
        )

    def pretrain(self, last_step, forward_step, callbacks):
        methods = {event: [getattr(one, event) for one in callbacks if hasattr(one, event)] for event in self.EVENTS}

        def fire(event, **more):
            for method in methods[event]:
                assert method.__func__  # the manager compares it with that of its own class
                method(SimpleNamespace(state=self.state, model=[self.model], user_state={}, **more))

        fire("on_train_start")
        while self.state.train_state.step < last_step:
            if self.state.train_state.step + 1 not in self.skipped:
                fire("on_train_step_start")
                loss = self.run_model(self.model, self.batch).mean()
                loss.backward()
                loss_dict = {"lm loss": loss.detach()}
                fire("on_train_step_end", loss_dict=loss_dict, grad_norm=1.0, skipped_iter=False)
                self.logged[self.state.train_state.step + 1] = {name: float(value) for name, value in loss_dict.items()}
            self.state.train_state.step += 1
        fire("on_train_end")


def test_megatron_bridge(mm, tmp_path):
    """Resumed after the third step, with one to be skipped: steps, metrics and values are those of Bridge's count."""
    bridge = Bridge(mm, tmp_path, step=3, skipped=(5,))
    scope = _recipe(1, pretrain=bridge.pretrain, cfg=8, forward_step=None)
    assert list(bridge.logged) == [4, 6, 7, 8]
    model = mm.build_model()
    with_losses = attach(model, scope["spec"])
    mm.run_model(model, bridge.batch).mean().backward()
    values = with_losses.end_step()
    for losses in bridge.logged.values():
        assert losses.keys() == {"lm loss", *values} and {name: losses[name] for name in values} == values
    lines = _lines(tmp_path)
    assert [line["iteration"] for line in lines] == [4, 6, 8]
    assert all(line["layers"] and line["coupling_loss"] == values["coupling_loss"] for line in lines)
    tensorboard, wandb = bridge.loggers
    assert list(tensorboard.tags) == list(wandb.rows) == [4, 6, 8]
    assert "moe_spec/routing_entropy/layer_0" in tensorboard.tags[4] and "moe_spec/routing_entropy" in wandb.rows[4]
    assert "coupling_loss" not in tensorboard.tags[4]  # Bridge logs it
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    assert all(torch.equal(weight.grad, 4 * gradients[name]) for name, weight in bridge.model.named_parameters())
    attach(bridge.model, BOTH)  # it was detached


def test_megatron_bridge_is_not_imported():
    code = "import sys; from megatron_moe_spec.integration.frameworks import megatron_bridge; print(*sys.modules)"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not [name for name in names if name.split(".")[0] == "megatron"]


def _train(mm, model, steps: int, begin=lambda: None, end=lambda: None) -> None:
    for _ in range(steps):
        begin()
        mm.run_model(model, mm.micro_batches(1)[0]).mean().backward()
        end()


def test_nemo(mm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "lightning", ModuleType("lightning"))
    monkeypatch.setitem(sys.modules, "lightning.pytorch", SimpleNamespace(Callback=object))
    callback, model = _recipe(2)["SpecCallback"](), mm.build_model()
    trainer = SimpleNamespace(model=nn.ModuleList([model]), global_step=0)

    def end():
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, None, None, None, trainer.global_step - 1)

    callback.on_train_start(trainer, None)
    _train(mm, model, 4, end=end)
    assert [line["iteration"] for line in _lines(tmp_path)] == [2, 4]


def test_verl(mm, monkeypatch):
    megatron_utils = SimpleNamespace(make_megatron_module=lambda wrap_config: ([mm.build_model()], {}))
    utils = SimpleNamespace(megatron_utils=megatron_utils)
    monkeypatch.setitem(sys.modules, "verl", SimpleNamespace(utils=utils))
    monkeypatch.setitem(sys.modules, "verl.utils", utils)
    handles = _recipe(3)["handles"]
    for is_trained in (False, True):
        settings = SimpleNamespace(wrap_with_ddp=is_trained, is_value_model=False)
        model, _ = megatron_utils.make_megatron_module(settings)
        assert len(handles) == is_trained
    _train(mm, model[0], 1)
    assert handles[0].end_step()["coupling_loss"] > 0


def test_slime(mm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope, model = _recipe(4), mm.build_model()
    _train(mm, model, 5, begin=lambda: scope["before_step"](None, 0, 0, [model], None, None))
    assert [line["iteration"] for line in _lines(tmp_path)] == [2, 4]


def test_every_recipe_is_run():
    assert len(BLOCKS) == 5
