"""A checkpoint with its experts in another order: the same function, and every weight where the order says."""

import random

import pytest
import torch

from megatron_moe_spec.placement.checkpoint import LATEST, reorder_experts
from megatron_moe_spec.placement.command import main

KINDS = {
    "every layer has experts": {},
    "dense layers between": dict(moe_layer_freq=[0, 1, 1]),
    "expert bias": dict(moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True),
    "shared expert": dict(moe_shared_expert_intermediate_size=24),
}
NUM_EXPERTS = 4
# How Megatron names experts in a checkpoint: a dimension of one tensor, or a name each.
FORMS = {"one tensor": {}, "one an expert": {"singleton_local_shards": True}}


def _save(model, folder, form="one tensor"):
    from megatron.core import dist_checkpointing

    (folder / "iter_0000007").mkdir(parents=True)
    dist_checkpointing.save({"model": model.sharded_state_dict(metadata=FORMS[form])}, str(folder / "iter_0000007"))
    (folder / LATEST).write_text("7")
    return folder


def _load(model, folder, form="one tensor"):
    from megatron.core import dist_checkpointing

    state = dist_checkpointing.load(
        {"model": model.sharded_state_dict(metadata=FORMS[form])}, str(folder / "iter_0000007")
    )
    model.load_state_dict(state["model"])
    return model


def _order(layers, seed=0):
    generator = random.Random(seed)
    return {layer: generator.sample(range(NUM_EXPERTS), NUM_EXPERTS) for layer in layers}


@pytest.mark.parametrize("kind, form", [*((kind, "one tensor") for kind in KINDS), ("shared expert", "one an expert")])
def test_the_function_is_the_same_bit_for_bit(mm, tmp_path, kind, form):
    settings = KINDS[kind]
    layers = [layer for layer, moe in enumerate(settings.get("moe_layer_freq", [1, 1, 1])) if moe]
    model = mm.build_model(seed=3, **settings)
    order = _order(layers)
    reorder_experts(_save(model, tmp_path / "saved", form), order, tmp_path / "reordered")
    found = _load(mm.build_model(seed=5, **settings), tmp_path / "reordered", form)

    (batch,) = mm.micro_batches(1)
    # Two experts a token: their sum is the same in either order.
    assert torch.equal(mm.run_model(found, batch), mm.run_model(model, batch))
    before, after = model.state_dict(), found.state_dict()
    moved = 0
    for layer in layers:
        mlp = f"decoder.layers.{layer}.mlp."
        for new, old in enumerate(order[layer]):
            for linear in ("linear_fc1", "linear_fc2"):
                weight = f"{mlp}experts.local_experts.{{}}.{linear}.weight"
                assert torch.equal(after[weight.format(new)], before[weight.format(old)])
            assert torch.equal(after[f"{mlp}router.weight"][new], before[f"{mlp}router.weight"][old])
            moved += new != old
    assert moved > 3


def test_the_folder_of_an_iteration_is_taken_as_well(mm, tmp_path):
    saved = _save(mm.build_model(), tmp_path / "saved")
    names = reorder_experts(saved / "iter_0000007", _order(range(3)), tmp_path / "reordered")
    assert any("router.weight" in name for name in names)
    assert (tmp_path / "reordered" / LATEST).read_text() == "7"


def test_the_command_reorders_by_a_trace(mm, tmp_path, capsys):
    from traces import random_trace, write_trace

    saved = _save(mm.build_model(seed=3), tmp_path / "saved")
    write_trace(tmp_path / "trace", random_trace(400, 3, NUM_EXPERTS, 2, seed=0, num_batches=4, sequences_per_batch=2))
    out = tmp_path / "reordered"
    command = [str(tmp_path / "trace"), "--devices", "2", "--format", "megatron", "--out", str(out)]
    assert main(command) == 2
    assert "--format megatron and --checkpoint, the one to reorder, need each other" in capsys.readouterr().err
    assert main([*command, "--checkpoint", str(saved), "--redundant", "2"]) == 2
    assert "--format megatron has one place for each expert: leave --redundant out" in capsys.readouterr().err
    assert main([*command, "--checkpoint", str(saved)]) == 0
    assert f"--load {out} --no-load-optim" in capsys.readouterr().out
    (batch,) = mm.micro_batches(1)
    found, model = _load(mm.build_model(seed=5), out), mm.build_model(seed=3)
    assert torch.equal(mm.run_model(found, batch), mm.run_model(model, batch))
    router = "decoder.layers.0.mlp.router.weight"
    assert not torch.equal(found.state_dict()[router], model.state_dict()[router])
    assert main([*command, "--checkpoint", str(saved)]) == 2
    assert "exists" in capsys.readouterr().err


def test_what_cannot_be_reordered_is_an_error(mm, tmp_path):
    saved = _save(mm.build_model(), tmp_path / "saved")
    with pytest.raises(
        ValueError, match=r"has experts in the layers \[0, 1, 2\], the trace in \[0, 1\]: .*another model"
    ):
        reorder_experts(saved, _order(range(2)), tmp_path / "out")
    with pytest.raises(ValueError, match="has 4 experts, the trace 8 in layer 0: the trace is of another model"):
        reorder_experts(saved, {layer: list(range(8)) for layer in range(3)}, tmp_path / "out")
    with pytest.raises(ValueError, match="no checkpoint of --ckpt-format torch_dist: convert it by"):
        reorder_experts(tmp_path, _order(range(3)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="exists: name a new folder with --out"):
        reorder_experts(saved, _order(range(3)), tmp_path / "out")
