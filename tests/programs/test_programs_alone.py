"""Programs other than pretraining, in one process: gradients are autograd's, or those of the model alone."""

import functools
import json
import warnings

import pytest
import torch
from loss_names import LOSS_NAMES
from rule_texts import message_of
from torch import nn

from megatron_moe_spec import SpecConfig

pytestmark = pytest.mark.slow
FULL = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
RECOMPUTATIONS = {
    "none": {},
    "uniform": FULL,
    "uniform, three layers": {**FULL, "recompute_num_layers": 3},
    "block": {**FULL, "recompute_method": "block", "recompute_num_layers": 2},
    "moe": dict(recompute_granularity="selective", recompute_modules=["moe"]),
    "around layers": {},
    "around mlp": {},
    "around the model": {},
    "around the model, uniform": FULL,
    "around layers, moe": dict(recompute_granularity="selective", recompute_modules=["moe"]),
}
# In which order outputs of a step see backward, or do not; functions of trainers.py.
TRAINED_ALONE = ["one_preference_backward", "first_in_first_out", "last_in_first_out"]
ORDERS = [*TRAINED_ALONE, "kept_between", "dropped_before", "dropped_between"]
THOROUGH = ["uniform", "around layers", "around the model"]
IN_ORDER = [(one, order) for one in THOROUGH for order in ORDERS] + [
    (one, order) for one in RECOMPUTATIONS if one not in THOROUGH for order in ("last_in_first_out", "kept_between")
]
TOLERANCE = 1e-5


def losses(*names: str, **settings) -> SpecConfig:
    return SpecConfig(**{f"{name}_coeff": 1.0 for name in names or LOSS_NAMES}, **settings)


ALL = losses(metrics_interval=1)
WITHOUT_ERC = [name for name in LOSS_NAMES if name != "erc_loss"]


@pytest.fixture
def any_length(trainers, monkeypatch):
    """Steps of micro-batches whose sequences have different lengths."""
    import megatron_models
    import reference

    for module in (megatron_models, reference):
        monkeypatch.setattr(module, "run_model", trainers.run)
    return trainers


def attach(model, config=ALL):
    from megatron_moe_spec import attach

    return attach(model, config)


def _built(recomputation: str, **settings):
    """A model with this recomputation, and how it is run."""
    import megatron_models
    import trainers

    model = megatron_models.build_model(**RECOMPUTATIONS[recomputation], **settings)
    if recomputation.startswith("around layers"):
        trainers.checkpoint_layers(model)
    if recomputation == "around mlp":
        trainers.checkpoint_layers(model, part="mlp")
    return model, trainers.checkpointed_run if "model" in recomputation else trainers.run


@functools.cache
def _by_autograd(kind: str, main_loss: str):
    import megatron_models
    import trainers

    batches = trainers.tokens_of(8, 8)
    return trainers.by_autograd(megatron_models.build_model(), batches, getattr(trainers, main_loss), kind)


# Recomputation


def _assert_right_in_order(recomputation: str, order: str, kind: str = "mass") -> None:
    import trainers

    main_loss = "preference" if order == "one_preference_backward" else "chosen_and_rejected"
    expected, values = _by_autograd(kind, main_loss)
    model, run = _built(recomputation)
    handle = attach(model, losses(coupling_type=kind))
    kept = getattr(trainers, order)(functools.partial(run, model), *trainers.tokens_of(8, 8, 8))
    assert trainers.worst_error(trainers.gradients_of(model), expected) < TOLERANCE
    del kept
    found = handle.end_step()
    if order in TRAINED_ALONE:
        assert found == pytest.approx(values, rel=1e-5)
    assert found.keys() == values.keys()


@pytest.mark.parametrize("recomputation, order", IN_ORDER)
def test_gradients_in_any_order_of_passes_equal_autograd(trainers, recomputation, order):
    _assert_right_in_order(recomputation, order)


@pytest.mark.parametrize("recomputation", [*THOROUGH, "moe"])
def test_pathway_gradients_of_preference_pairs_equal_autograd(trainers, recomputation):
    _assert_right_in_order(recomputation, "one_preference_backward", "pathway")


@pytest.mark.parametrize("recomputation", THOROUGH)
def test_an_output_dropped_in_a_later_step_leaves_its_gradients_alone(trainers, recomputation):
    results = []
    for order in (trainers.kept_between, trainers.one_backward):
        model, run = _built(recomputation)
        handle, kept = attach(model), None
        for step in range(3):
            model.zero_grad()
            batches = trainers.tokens_of(8, 8, 8, seed=step)
            latest = order(functools.partial(run, model), *batches)
            handle.end_step()
            del kept
            kept = latest  # noqa: F841 (until the next step)
        results.append(trainers.gradients_of(model))
    trainers.assert_identical(*results)


@pytest.mark.parametrize("recomputation", ["uniform", "around the model"])
def test_nothing_grows_over_steps(trainers, recomputation):
    before = trainers.micro_batches_alive()
    model, run = _built(recomputation, num_layers=2, num_moe_experts=2)
    handle, alive = attach(model, losses()), []
    batches = trainers.tokens_of(4, 4, 4, size=1)
    for step in range(8):
        kept = trainers.all_of_it(functools.partial(run, model), *batches)
        handle.end_step()
        if step in (1, 7):
            alive.append(trainers.micro_batches_alive())
    assert alive[0] == alive[1]
    del kept
    assert trainers.micro_batches_alive() == before


@pytest.mark.parametrize("part", ["", "mlp"], ids=["layer", "mlp"])
@pytest.mark.parametrize("name", LOSS_NAMES)
def test_a_checkpoint_that_is_not_reentrant_is_refused_by_name(mm, trainers, name, part):
    model = mm.build_model()
    trainers.checkpoint_layers(model, use_reentrant=False, part=part)
    attach(model, losses(name))
    with pytest.raises(RuntimeError, match="use_reentrant"):
        trainers.run(model, *trainers.tokens_of(8)).mean().backward()


@pytest.mark.parametrize("names", [WITHOUT_ERC, ["erc_loss"]], ids=["without ERC", "ERC"])
def test_a_checkpoint_around_the_model_that_is_not_reentrant_is_right_or_refused(mm, trainers, names):
    batches = trainers.tokens_of(8, 8)
    expected, _ = trainers.by_autograd(mm.build_model(), batches, trainers.chosen_and_rejected, "mass", names)
    model = mm.build_model()
    attach(model, losses(*names))
    run = functools.partial(trainers.checkpointed_run, model, use_reentrant=False)
    try:
        trainers.one_backward(run, *batches, None)
    except RuntimeError as error:
        assert "use_reentrant" in str(error)
    else:
        assert trainers.worst_error(trainers.gradients_of(model), expected) < TOLERANCE


# Other models in the module


@functools.cache
def _student_alone(recompute: bool):
    import megatron_models

    model = megatron_models.build_model(**(FULL if recompute else {}))
    handle = attach(model)
    return megatron_models.train_step(model, megatron_models.micro_batches(2), 1.0), handle.end_step()


@pytest.mark.parametrize(
    "first, runs, teacher_trains, recompute",
    [
        ("student", "before", False, False),
        ("student", "after", True, True),
        ("student", "idle", True, False),
        ("teacher", "before", True, True),
        ("teacher", "before", True, False),
        ("teacher", "after", False, True),
        ("teacher", "idle", False, False),
    ],
)
def test_student_beside_a_teacher_trains_as_alone(mm, trainers, first, teacher_trains, runs, recompute):
    settings = FULL if recompute else {}
    expected, values = _student_alone(recompute)
    teacher = mm.build_model(seed=9, num_layers=4, **settings)
    model = trainers.Distilled(mm.build_model(**settings), teacher, first, runs, teacher_trains)
    handle = attach(model)
    found = mm.train_step(model, mm.micro_batches(2), 1.0)
    trainers.assert_identical(found, {f"student.{name}": gradient for name, gradient in expected.items()})
    assert handle.end_step() == values
    assert handle.layers == [f"student.decoder.layers.{i}.mlp" for i in range(3)]
    assert list(handle.skipped) == [f"teacher.decoder.layers.{i}.mlp" for i in range(4)]
    assert "teacher.decoder.layers.3.mlp" in handle.describe()


@pytest.mark.parametrize(
    "runs, teacher_trains, recompute", [(False, True, False), (True, False, False), (True, True, True)]
)
def test_teacher_as_an_attribute_of_the_model(mm, trainers, recompute, teacher_trains, runs):
    settings = FULL if recompute else {}
    expected, values = _student_alone(recompute)
    model = mm.build_model(**settings)
    model.teacher = mm.build_model(seed=9, num_layers=4, **settings).requires_grad_(False).train(teacher_trains)

    def run_teacher(module, args, kwargs):
        with torch.no_grad():
            module.teacher(*args, **kwargs)

    handle = attach(model)
    if runs:
        model.register_forward_pre_hook(run_teacher, with_kwargs=True)
    trainers.assert_identical(mm.train_step(model, mm.micro_batches(2), 1.0), expected)
    assert handle.end_step() == values
    assert len(handle.layers) == 3 and all(name.startswith("teacher.") for name in handle.skipped)
    assert len(handle.skipped) == 4


def test_two_trained_models_in_one_module_are_refused(mm):
    model = nn.ModuleDict(dict(actor=mm.build_model(), critic=mm.build_model()))
    with pytest.raises(ValueError, match=r"actor, critic.*requires_grad_\(False\)"):
        attach(model)


def test_a_frozen_model_is_refused(mm):
    with pytest.raises(ValueError, match=message_of("a frozen model")):
        attach(mm.build_model().requires_grad_(False))


def test_a_module_of_frozen_models_is_refused(mm):
    model = nn.ModuleDict(dict(actor=mm.build_model(), critic=mm.build_model())).requires_grad_(False)
    with pytest.raises(ValueError, match="no model that is trained.*actor, critic"):
        attach(model)


def test_mtp_layers_are_named_as_left_out(mm):
    handle = attach(mm.build_model(mtp_num_layers=1))
    assert len(handle.layers) == 3
    assert len(handle.skipped) == 1
    for name, reason in handle.skipped.items():
        assert name.startswith("mtp.") and "multi-token prediction" in reason


# Copies


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "recompute"])
def test_a_copy_of_an_attached_model_is_plain(mm, trainers, recompute):
    settings, batches = FULL if recompute else {}, mm.micro_batches(2)
    expected, values = _student_alone(recompute)
    plain = mm.train_step(mm.build_model(**settings), batches, 1.0)
    model = mm.build_model(**settings)
    earlier = trainers.copied(model)
    handle = attach(model)
    copied = trainers.copied(model)
    for one in (earlier, copied):
        trainers.assert_identical(mm.train_step(trainers.copied(one), batches, 1.0), plain)
    trainers.assert_identical(mm.train_step(trainers.copied(model), batches, 1.0), plain)
    # The copies' passes were not the original's.
    trainers.assert_identical(mm.train_step(copied, batches, 1.0), plain)
    trainers.assert_identical(mm.train_step(model, batches, 1.0), expected)
    assert handle.end_step() == values


@pytest.mark.parametrize("made", ["before", "after", "after detach"])
def test_losses_on_a_copy_and_on_its_original_are_apart(mm, trainers, made):
    batches = mm.micro_batches(2)
    expected, values = _student_alone(False)
    plain = mm.train_step(mm.build_model(), batches, 1.0)
    model = mm.build_model()
    copied = trainers.copied(model)
    handle = attach(model)
    if made == "after":
        copied = trainers.copied(model)
    if made == "after detach":
        handle.detach()
        copied, handle = trainers.copied(model), attach(model)
    of_copy = attach(copied)
    handle.detach()
    trainers.assert_identical(mm.train_step(copied, batches, 1.0), expected)
    assert of_copy.end_step() == values
    trainers.assert_identical(mm.train_step(model, batches, 1.0), plain)


def test_an_average_of_weights_beside_training(mm, trainers):
    """Kept in the model, run for evaluation, and moved after every step."""
    results = []
    for averaged in (False, True):
        model = mm.build_model()
        handle = attach(model)
        average = trainers.copied(model).requires_grad_(False).eval() if averaged else None
        seen = []
        for step in range(3):
            model.zero_grad()
            trainers.run(model, *trainers.tokens_of(8, seed=step)).mean().backward()
            seen.append((trainers.gradients_of(model), handle.end_step()))
            with torch.no_grad():
                for weight in model.parameters():
                    weight -= 0.1 * weight.grad
                if averaged:
                    for mean, weight in zip(average.parameters(), model.parameters()):
                        mean.lerp_(weight, 0.1)
                    trainers.run(average, *trainers.tokens_of(8, seed=step))
        results.append(seen)
    for (expected, values), (found, found_values) in zip(*results, strict=True):
        trainers.assert_identical(found, expected)
        assert found_values == values


# Micro-batches


def _padded(mm, *sizes: int) -> list[dict]:
    """Micro-batches of which each has this number of tokens in each sequence."""
    batches = mm.micro_batches(len(sizes))
    for batch, size in zip(batches, sizes):
        batch["padding_mask"] = torch.arange(mm.SEQUENCE).expand_as(batch["tokens"]) >= size
    return batches


@pytest.mark.parametrize("per_token", [False, True], ids=["per micro-batch", "per token"])
@pytest.mark.parametrize(
    "sizes, kind, recompute",
    [
        ((12, 0, 7), "mass", False),
        ((12, 0, 7), "pathway", True),
        ((0, 12, 7), "mass", True),
        ((12, 0), "pathway", False),
    ],
)
def test_a_micro_batch_of_padding_counts_for_nothing(mm, trainers, sizes, per_token, kind, recompute):
    from reference import reference_step

    batches = _padded(mm, *sizes)
    full = [batch for batch, size in zip(batches, sizes) if size]
    model = mm.build_model(calculate_per_token_loss=per_token)
    expected, values = reference_step(model, full, losses(coupling_type=kind))
    factor = 1.0 if per_token else len(full) / len(batches)
    model = mm.build_model(calculate_per_token_loss=per_token, **(FULL if recompute else {}))
    handle = attach(model, losses(coupling_type=kind, metrics_interval=1))
    found = mm.train_step(model, batches)
    assert trainers.worst_error(found, {name: factor * gradient for name, gradient in expected.items()}) < TOLERANCE
    metrics = handle.end_step()
    diagnostics = metrics.pop("diagnostics")
    assert metrics == pytest.approx(values, rel=1e-5)

    model = mm.build_model(calculate_per_token_loss=per_token)
    handle = attach(model, losses(coupling_type=kind, metrics_interval=1))
    mm.train_step(model, full)
    expected_diagnostics = handle.end_step()["diagnostics"]
    for part in ("layers", "pairs"):
        for one, other in zip(diagnostics[part], expected_diagnostics[part], strict=True):
            assert one.keys() == other.keys()
            for name, value in one.items():
                assert value == pytest.approx(other[name], rel=1e-5), name


@pytest.mark.parametrize("kind, recompute", [("mass", True), ("pathway", False)])
@pytest.mark.parametrize("per_token", [False, True], ids=["per micro-batch", "per token"])
def test_padding_alone_logs_nothing(mm, per_token, kind, recompute):
    model = mm.build_model(calculate_per_token_loss=per_token, **(FULL if recompute else {}))
    handle = attach(model, losses(coupling_type=kind, metrics_interval=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = mm.train_step(model, _padded(mm, 0, 0))
        metrics = handle.end_step()
    assert all(not gradient.any() for gradient in found.values())
    assert metrics.keys() == {"diagnostics"}
    json.dumps(metrics, allow_nan=False)
    assert all(layer["routing_entropy"] is None for layer in metrics["diagnostics"]["layers"])


def test_a_step_without_any_forward_has_no_nan(mm):
    handle = attach(mm.build_model())
    with pytest.warns(UserWarning):
        json.dumps(handle.end_step(), allow_nan=False)


@pytest.mark.parametrize(
    "recomputation, kind, per_token",
    [
        ("none", "mass", True),
        ("none", "pathway", False),
        ("uniform", "mass", True),
        ("block", "pathway", True),
        ("moe", "pathway", True),
        ("around layers", "mass", True),
    ],
)
def test_micro_batches_of_different_lengths(mm, any_length, per_token, kind, recomputation):
    from reference import reference_step

    batches = any_length.tokens_of(4, 12, 7)
    model = mm.build_model(calculate_per_token_loss=per_token)
    expected, values = reference_step(model, batches, losses(coupling_type=kind))
    model = mm.build_model(calculate_per_token_loss=per_token, **RECOMPUTATIONS[recomputation])
    if recomputation == "around layers":
        any_length.checkpoint_layers(model)
    handle = attach(model, losses(coupling_type=kind))
    found = mm.train_step(model, batches)
    assert any_length.worst_error(found, expected) < TOLERANCE
    assert handle.end_step() == pytest.approx(values, rel=1e-5)


# Passes that do not train


def _eval_mode(model):
    model.eval()
    return model.train


def _without_gradients_in_the_decoder(model):
    original = model.decoder.forward
    model.decoder.forward = torch.no_grad()(original)
    return lambda: setattr(model.decoder, "forward", original)


def _without_gradients(model):
    model.forward = torch.no_grad()(type(model).forward.__get__(model))
    return lambda: delattr(model, "forward")


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "recompute"])
@pytest.mark.parametrize("spoil", [_eval_mode, _without_gradients_in_the_decoder, _without_gradients])
def test_steps_that_do_not_train_are_named_once_and_log_nothing(mm, trainers, spoil, recompute):
    settings = FULL if recompute else {}
    batch = trainers.tokens_of(8)[0]
    before = trainers.micro_batches_alive()
    model = mm.build_model(**settings)
    handle = attach(model, losses())
    repair = spoil(model)
    with pytest.warns(UserWarning) as seen:
        for _ in range(5):
            output = trainers.run(model, batch)
            if output.requires_grad:
                output.mean().backward()
            assert handle.end_step() == {}
    del output
    messages = [str(one.message) for one in seen if "specialization_loss" in str(one.message)]
    assert len(messages) == 1 and all(name in messages[0] for name in LOSS_NAMES)
    assert trainers.micro_batches_alive() == before

    repair()
    model.zero_grad()
    expected_model = mm.build_model(**settings)
    expected_handle = attach(expected_model, losses())
    expected_handle.start_after(5)
    for one in (expected_model, model):
        trainers.run(one, batch).mean().backward()
    trainers.assert_identical(trainers.gradients_of(model), trainers.gradients_of(expected_model))
    values = expected_handle.end_step()
    assert handle.end_step() == values and values.keys() == set(LOSS_NAMES)


@pytest.mark.parametrize("recomputation", ["none", "uniform", "around layers"])
def test_policy_in_a_reinforcement_learning_loop_trains_as_alone(mm, trainers, recomputation):
    """Generation, log-probabilities and a frozen reference model between and within the steps."""

    def generate(model):
        model.eval()
        with torch.no_grad():
            for length in (3, 4, 5):
                trainers.run(model, *trainers.tokens_of(length, seed=length, size=1))
        model.train()

    def log_probabilities(model, batches):
        with torch.no_grad():
            return [trainers.run(model, batch) for batch in batches]

    results = []
    for alone in (True, False):
        policy, run = _built(recomputation)
        reference = mm._build_gpt(policy.config, seed=0).requires_grad_(False)
        handle = attach(policy)
        steps = []
        for step in range(3):
            batches = trainers.tokens_of(8, 8, seed=step)
            if not alone:
                generate(policy)
                log_probabilities(policy, batches)
                log_probabilities(reference.train(step % 2 == 0), batches)
            policy.zero_grad()
            outputs = []
            for batch in batches:
                outputs.append(run(policy, batch))
                if not alone:
                    log_probabilities(reference, [batch])
                    log_probabilities(policy, [batch])
            trainers.preference(*outputs).backward()
            steps.append((trainers.gradients_of(policy), handle.end_step()))
            with torch.no_grad():
                for weight in policy.parameters():
                    weight -= 0.1 * weight.grad
        results.append(steps)
    for (expected, values), (found, found_values) in zip(*results, strict=True):
        trainers.assert_identical(found, expected)
        assert found_values == values and len(values) == len(LOSS_NAMES) + 1


# Adapters

ADAPTED = [
    (["router"], "to_wrap", True),
    (["linear_fc1"], "to_wrap", False),
    (["linear_fc2"], "base_layer", False),
    (["linear_fc2"], "to_wrap", True),
    (["router", "linear_fc1", "linear_fc2"], "base_layer", False),
]
# Losses of the weights that adapters leave as they are.
REFUSED_WITH_ADAPTERS = {"router": ["erc_loss", "router_orthogonality_loss"], "linear_fc1": ["erc_loss"]}
REFUSED_BY = {
    "erc_loss": message_of("adapters around the router or linear_fc1"),
    "router_orthogonality_loss": message_of("adapters around the router"),
}
orders = pytest.mark.parametrize("order", ["attach, adapt", "adapt, attach"])


@orders
@pytest.mark.parametrize("names, attribute, recompute", ADAPTED)
def test_adapted_model_trains_as_with_merged_weights(mm, trainers, names, attribute, order, recompute):
    refused = {loss for module in names for loss in REFUSED_WITH_ADAPTERS.get(module, ())}
    own = [name for name in LOSS_NAMES if name not in refused]
    batches = trainers.tokens_of(8, 8)
    merged = mm.build_model()
    trainers.merge(merged, names)
    expected, values = trainers.by_autograd(merged, batches, trainers.chosen_and_rejected, "mass", own)
    model = mm.build_model(**(FULL if recompute else {}))
    if order == "attach, adapt":
        handle = attach(model, losses(*own))
    trainers.adapt(model, names, attribute)
    if order == "adapt, attach":
        handle = attach(model, losses(*own))
    trainers.one_backward(functools.partial(trainers.run, model), *batches, None)
    found = trainers.gradients_of(model)
    assert trainers.worst_error(found, trainers.of_adapters(expected, model, attribute)) < TOLERANCE
    assert handle.end_step() == pytest.approx(values, rel=1e-5)


@orders
@pytest.mark.parametrize("attribute", ["to_wrap", "base_layer"])
@pytest.mark.parametrize(
    "name, loss", [(name, loss) for name, those in REFUSED_WITH_ADAPTERS.items() for loss in those]
)
def test_a_loss_of_adapted_weights_is_refused_by_name(mm, trainers, name, loss, attribute, order):
    model = mm.build_model()
    config, flag = losses(loss), f"{REFUSED_BY[loss]}.*--moe-{loss.replace('_', '-')}-coeff to 0"
    if order == "adapt, attach":
        trainers.adapt(model, [name], attribute)
        with pytest.raises(ValueError, match=flag):
            attach(model, config)
    else:
        attach(model, config)
        trainers.adapt(model, [name], attribute)
        with pytest.raises(RuntimeError, match=flag):
            trainers.run(model, *trainers.tokens_of(8))


# Dtypes of the router

DTYPES = {
    "fp64": dict(moe_router_dtype="fp64"),
    "fp32": dict(moe_router_dtype="fp32"),
    "bf16": dict(moe_router_dtype=None, bf16=True, params_dtype=torch.bfloat16),
}


@pytest.mark.parametrize(
    "dtype, recompute, name",
    [
        *(("fp64", False, name) for name in LOSS_NAMES),
        *((dtype, recompute, "all") for dtype in DTYPES for recompute in (False, True)),
    ],
)
def test_router_dtype(mm, trainers, dtype, recompute, name):
    from reference import reference_step

    names = LOSS_NAMES if name == "all" else [name]
    batches = mm.micro_batches(2)
    expected, values = reference_step(mm.build_model(**DTYPES[dtype]), batches, losses(*names))
    model = mm.build_model(**DTYPES[dtype], **(FULL if recompute else {}))
    handle = attach(model, losses(*names))
    found = mm.train_step(model, batches)
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    found_values = handle.end_step()
    assert found_values.keys() == set(names)
    if dtype == "bf16":
        assert found_values == pytest.approx({one: values[one] for one in names}, rel=0.05)
        return
    assert found_values == pytest.approx({one: values[one] for one in names}, rel=1e-5)
    expected = {one: expected.get(one, torch.zeros_like(gradient)) for one, gradient in found.items()}
    assert trainers.worst_error(found, expected) < TOLERANCE


# Frozen parts of the trained model

FROZEN = {
    "routers": lambda name: "router" in name,
    "experts": lambda name: "experts" in name,
    "attention": lambda name: "attention" in name,
    "embedding": lambda name: "embedding" in name,
    "lower layers": lambda name: "embedding" in name or "layers.0." in name or "layers.1." in name,
    "all but routers": lambda name: "router" not in name,
    "all but the upper experts": lambda name: "layers.2.mlp.experts" not in name,
}


@pytest.mark.parametrize(
    "frozen, recomputation",
    [*((frozen, "uniform") for frozen in FROZEN), ("experts", "none"), ("lower layers", "none"), ("routers", "moe")],
)
def test_what_trains_beside_frozen_parts_trains_as_without(mm, trainers, frozen, recomputation):
    expected, values = _nothing_frozen(recomputation)
    model = mm.build_model(**RECOMPUTATIONS[recomputation])
    for name, weight in model.named_parameters():
        weight.requires_grad_(not FROZEN[frozen](name))
    # A reentrant checkpoint passes gradients on only where its input has one, so frameworks see to that.
    model.embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())
    handle = attach(model, losses())
    found = mm.train_step(model, mm.micro_batches(2), 1.0)
    assert found and trainers.worst_error(found, {name: expected[name] for name in found}) < TOLERANCE
    assert handle.end_step() == pytest.approx(values, rel=1e-6)


@functools.cache
def _nothing_frozen(recomputation: str):
    import megatron_models

    model = megatron_models.build_model(**RECOMPUTATIONS[recomputation])
    handle = attach(model, losses())
    return megatron_models.train_step(model, megatron_models.micro_batches(2), 1.0), handle.end_step()


# Packed sequences


@pytest.mark.parametrize("recomputation", ["none", "uniform", "around layers"])
def test_packed_sequences_train_as_one_by_one(mm, trainers, monkeypatch, recomputation):
    trainers.use_packed_attention(monkeypatch)
    batches = trainers.tokens_of(5, 12, 7, 12, size=1)
    # Means over tokens; the variance of scores, and the pathway kind of coupling, are of a whole micro-batch.
    config = losses(*(name for name in LOSS_NAMES if name != "score_variance_loss"))
    results = []
    for packed in (True, False):
        model = mm.build_model(calculate_per_token_loss=True, **(RECOMPUTATIONS[recomputation] if packed else {}))
        if packed and recomputation == "around layers":
            trainers.checkpoint_layers(model)
        handle = attach(model, config)
        outputs = [trainers.run_packed(model, batches)] if packed else [trainers.run(model, one) for one in batches]
        (0.1 * sum(output.sum() for output in outputs)).backward()
        results.append((torch.cat([one.detach().flatten() for one in outputs]), trainers.gradients_of(model)))
        assert handle.end_step().keys() == set(config.trained_losses)
    (outputs, found), (expected_outputs, expected) = results
    torch.testing.assert_close(outputs, expected_outputs)
    assert trainers.worst_error(found, expected) < TOLERANCE
