"""The Megatron that is installed has what this package relies on; a failing test's name says what it lacks.

Run it first with a new release: see "Upgrade to a new Megatron release" in CONTRIBUTING.md.
"""

import ast
import importlib
import inspect
import sys

import pytest
import torch
from processes import ROOT, needs_megatron, needs_training_loop

from megatron_moe_spec.integration.compat import protocols
from megatron_moe_spec.integration.compat.groups import process_groups

pytestmark = needs_megatron
COMPAT = ROOT / "megatron_moe_spec" / "integration" / "compat"

# Functions that are replaced, wrapped or called: their leading parameters, and others by name.
SIGNATURES = {
    "core.transformer.moe.router:TopKRouter.routing": ["self", "logits"],
    "core.transformer.moe.experts:SequentialMLP.forward": [
        "self", "permuted_local_hidden_states", "tokens_per_expert", "permuted_probs",
    ],
    "core.transformer.moe.experts:TEGroupedMLP.forward": [
        "self", "permuted_local_hidden_states", "tokens_per_expert", "permuted_probs",
    ],
    "core.transformer.moe.moe_layer:MoELayer.preprocess": ["self", "hidden_states", "probs", "routing_map"],
    "core.models.gpt.gpt_model:GPTModel.set_input_tensor": ["self", "input_tensor"],
    "core.tensor_parallel.random:CheckpointFunction.forward": ["ctx"],
    "core.tensor_parallel.random:CheckpointFunction.backward": ["ctx"],
    "core.process_groups_config:ProcessGroupCollection.use_mpu_process_groups": ["required_pgs"],
}  # fmt: skip
KEYWORDS = {
    "core.pipeline_parallel.schedules:forward_backward_no_pipelining": {"forward_step_func", "model", "forward_only"},
    "core.pipeline_parallel.schedules:forward_backward_pipelining_without_interleaving": {
        "forward_step_func", "model", "forward_only", "adjust_tensor_shapes_fn",
    },
    "core.pipeline_parallel.schedules:forward_backward_pipelining_with_interleaving": {
        "forward_step_func", "model", "forward_only", "seq_length", "micro_batch_size",
    },
    "core.transformer.transformer_block:get_num_layers_to_build": {"config", "vp_stage", "pp_rank"},
}  # fmt: skip
TRAINING = {
    "training.arguments:add_megatron_arguments": ["parser"],
    "training.arguments:parse_args": ["extra_args_provider"],
    "training.arguments:validate_args": ["args"],
    "training.arguments:core_transformer_config_from_args": ["args"],
    "training.training:setup_model_and_optimizer": [],
    "training.training:training_log": ["loss_dict", "total_loss_dict", "learning_rate", "iteration"],
    "training.training:get_args": [],
}
# Of objects of a model that has run, by where they are below an MoE layer: protocols, or names.
ATTRIBUTES = {
    "": protocols.MoELayer,
    "config": protocols.TransformerConfig,
    "router": protocols.Router,
    "experts": ["local_experts"],
    "experts.local_experts.0": ["linear_fc1", "linear_fc2"],
    "experts.local_experts.0.linear_fc1": ["weight"],
    "token_dispatcher": protocols.TokenDispatcher,
}
OF_DISPATCHER = {"alltoall": protocols.AllToAllDispatcher, "allgather": protocols.AllGatherDispatcher}


def _resolve(path: str):
    module, _, names = path.partition(":")
    found = importlib.import_module(f"megatron.{module}")
    for name in names.split("."):
        found = getattr(found, name)
    return found


def _imports() -> list[str]:
    """All that integration/compat imports from Megatron, as module:name."""
    found = set()
    for file in COMPAT.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "megatron":
                found |= {f"{node.module.partition('.')[2]}:{alias.name}" for alias in node.names}
    return sorted(found)


@pytest.mark.parametrize("path", [path for path in _imports() if not path.startswith("training")])
def test_imported_symbol(megatron, path):
    if path.startswith("core.pipeline_parallel:"):
        importlib.import_module("megatron.core.pipeline_parallel.schedules")
    assert _resolve(path) is not None


@needs_training_loop
@pytest.mark.parametrize("path", [path for path in _imports() if path.startswith("training")])
def test_imported_symbol_of_the_training_program(megatron, path):
    module, _, name = path.partition(":")
    found = importlib.import_module(f"megatron.{module}")
    assert hasattr(found, name) or importlib.import_module(f"megatron.{module}.{name}")


@pytest.mark.parametrize("path", SIGNATURES)
def test_signature(megatron, path):
    assert list(inspect.signature(_resolve(path)).parameters)[: len(SIGNATURES[path])] == SIGNATURES[path]


@pytest.mark.parametrize("path", KEYWORDS)
def test_keywords(megatron, path):
    assert set(inspect.signature(_resolve(path)).parameters) >= KEYWORDS[path]


@needs_training_loop
@pytest.mark.parametrize("path", TRAINING)
def test_signature_of_the_training_program(megatron, path):
    assert list(inspect.signature(_resolve(path)).parameters)[: len(TRAINING[path])] == TRAINING[path]


def _attributes(protocol: type) -> list[str]:
    """Names that a protocol and its bases declare."""
    return [name for base in protocol.__mro__ for name in inspect.get_annotations(base)]


def _missing(owner, names) -> list[str]:
    names = names if isinstance(names, list) else _attributes(names)
    assert names
    return [name for name in names if not hasattr(owner, name)]


def test_fields_of_the_transformer_config(megatron):
    config_class = _resolve("core.transformer.transformer_config:TransformerConfig")
    config = config_class(num_layers=1, hidden_size=8, num_attention_heads=1)
    assert _missing(config, protocols.TransformerConfig) == []


@pytest.mark.parametrize("dispatcher", OF_DISPATCHER)
def test_attributes_of_a_model_that_has_run(mm, dispatcher):
    model = mm.build_model(num_layers=1, moe_token_dispatcher_type=dispatcher)
    mm.run_model(model, mm.micro_batches(1)[0])
    layer, missing = model.decoder.layers[0].mlp, []
    for place, names in [*ATTRIBUTES.items(), ("token_dispatcher", OF_DISPATCHER[dispatcher])]:
        owner = layer
        for name in filter(None, place.split(".")):
            owner = owner[int(name)] if name.isdigit() else getattr(owner, name)
        missing += [f"{place}.{name}" for name in _missing(owner, names)]
    assert missing == []


def test_process_groups_of_a_model(mm):
    assert _missing(process_groups(mm.build_model(num_layers=1)), protocols.ProcessGroupCollection) == []


@needs_training_loop
def test_arguments_of_the_training_program(megatron, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert _missing(_resolve("training.arguments:parse_args")(), protocols.Arguments) == []


@pytest.mark.parametrize("dispatcher", OF_DISPATCHER)
def test_rows_lie_by_expert_then_token(mm, dispatcher):
    """The experts' input on one rank; the layout tests prove the orders over several ranks."""
    model = mm.build_model(num_layers=1, moe_token_dispatcher_type=dispatcher)
    layer, seen = model.decoder.layers[0].mlp, {}
    layer.register_forward_pre_hook(lambda module, args: seen.update(tokens_TH=args[0].flatten(0, 1)))
    layer.experts.register_forward_pre_hook(lambda module, args: seen.update(rows_PH=args[0], p_P=args[2]))
    routing = layer.router.routing
    layer.router.routing = lambda *args, **kwargs: seen.setdefault("routed", routing(*args, **kwargs))
    mm.run_model(model, mm.micro_batches(1)[0])
    probs_TE, map_TE = seen["routed"]
    order = [(token, expert) for expert in range(map_TE.shape[1]) for token in map_TE[:, expert].nonzero().flatten()]
    tokens, experts = (torch.tensor(column) for column in zip(*order))
    assert torch.equal(seen["rows_PH"], seen["tokens_TH"][tokens])
    assert torch.equal(seen["p_P"], probs_TE[tokens, experts])


def test_the_scale_of_auxiliary_losses(megatron):
    scaler = _resolve("core.transformer.moe.moe_utils:MoEAuxLossAutoScaler")
    assert scaler.main_loss_backward_scale is None or float(scaler.main_loss_backward_scale) > 0
