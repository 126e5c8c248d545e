"""An unedited pretraining script through Megatron's own loop, the launcher and the CPU backend."""

import importlib.util
import json
import re
import subprocess
import sys

import pytest
import torch
from processes import ROOT, torchrun

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.training") is None,
    reason="megatron.training is not installed (it comes with megatron-core >= 0.17)",
)

MODEL = """
    --num-layers 2 --hidden-size 32 --num-attention-heads 2 --ffn-hidden-size 64 --seq-length 32
    --max-position-embeddings 32 --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --make-vocab-size-divisible-by 64
    --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 32 --moe-router-load-balancing-type aux_loss
    --moe-aux-loss-coeff 1e-2 --moe-token-dispatcher-type alltoall --moe-router-dtype fp32
    --transformer-impl local --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-persist-layer-norm
    --no-rope-fusion --distributed-backend gloo
    --micro-batch-size 2 --global-batch-size 4 --lr 5e-3 --lr-decay-style constant --clip-grad 1.0 --log-interval 1
    --eval-interval 100 --eval-iters 1 --num-workers 0 --mock-data --tokenizer-type NullTokenizer --vocab-size 63
    --split 90,5,5 --ckpt-format torch --seed 7
""".split()
LOSSES = ["--moe-specialization-loss-coeff", "2e-2", "--moe-coupling-loss-coeff", "1e-2"]


def _launch(*flags, processes=1) -> str:
    launcher = ["-m", "megatron_moe_spec.launch", "--cpu", ROOT / "examples" / "pretrain_gpt.py"]
    return torchrun(processes, *launcher, *MODEL, *flags)


def _logged(output: str) -> list[dict[str, str]]:
    """Per iteration, the values of the console line as printed, without what depends on the clock."""
    lines = re.findall(r"iteration +\d+/.*", output)
    return [
        dict(re.findall(r"(lm loss|specialization_loss|coupling_loss|load_balancing_loss|grad norm): (\S+)", line))
        for line in lines
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Four iterations without flags, with coefficients 0, and with the losses; checkpoints after two and four."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name, *flags):
        save = ["--save", folder / name, "--save-interval", 2, "--tensorboard-dir", folder / name]
        return _launch("--train-iters", 4, *save, *flags)

    outputs = {
        "plain": run("plain"),
        "zero": run("zero", "--moe-specialization-loss-coeff", "0", "--moe-coupling-loss-coeff", "0"),
        "losses": run("losses", *LOSSES, "--moe-spec-metrics-interval", "2"),
    }
    return folder, outputs


def _weights(folder, iteration) -> dict:
    (file,) = folder.glob(f"iter_{iteration:07d}/*/model_optim_rng.pt")
    return torch.load(file, weights_only=False)["model"]


def test_first_forward_is_the_same_with_the_losses(runs):
    _, outputs = runs
    plain, losses = _logged(outputs["plain"])[0], _logged(outputs["losses"])[0]
    assert losses["lm loss"] == plain["lm loss"]
    assert losses["load_balancing_loss"] == plain["load_balancing_loss"]
    assert losses["grad norm"] != plain["grad norm"]


def test_zero_coefficients_give_a_bitwise_equal_run(runs):
    folder, outputs = runs
    assert _logged(outputs["zero"]) == _logged(outputs["plain"])
    plain, zero = _weights(folder / "plain", 4), _weights(folder / "zero", 4)
    assert plain.keys() == zero.keys()
    tensors = [key for key, value in plain.items() if torch.is_tensor(value)]
    assert len(tensors) > 10
    for key in tensors:
        assert torch.equal(plain[key], zero[key]), key


def test_state_dict_keys_do_not_change(runs):
    folder, _ = runs
    assert _weights(folder / "plain", 4).keys() == _weights(folder / "losses", 4).keys()


def test_losses_are_in_the_console_and_in_tensorboard(runs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, outputs = runs
    for name in ("specialization_loss", "coupling_loss"):
        assert all(name in line for line in _logged(outputs["losses"]))
        assert not any(name in line for line in _logged(outputs["plain"]))
    events = EventAccumulator(str(folder / "losses"))
    events.Reload()
    for name in ("specialization_loss", "coupling_loss"):
        scalars = events.Scalars(name)
        assert [s.step for s in scalars] == [1, 2, 3, 4]
        console = [float(line[name]) for line in _logged(outputs["losses"])]
        assert [s.value for s in scalars] == pytest.approx(console, rel=1e-5)
    assert [s.step for s in events.Scalars("moe_spec/routing_entropy/layer_1")] == [2, 4]
    assert [s.step for s in events.Scalars("moe_spec/conditional_entropy/layers_0_1")] == [2, 4]


def test_metrics_file(runs):
    folder, outputs = runs
    lines = [json.loads(line) for line in (folder / "losses" / "moe_spec_metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [2, 4]
    for line in lines:
        console = _logged(outputs["losses"])[line["iteration"] - 1]
        assert line["coupling_loss"] == pytest.approx(float(console["coupling_loss"]), rel=1e-5)
        assert [layer["layer"] for layer in line["layers"]] == [0, 1]
        assert all(0 < layer["mean_abs_cos"] <= layer["max_abs_cos"] <= 1 for layer in line["layers"])
        assert all(layer["load_imbalance"] >= 1 for layer in line["layers"])
        assert [pair["layers"] for pair in line["pairs"]] == [[0, 1]]


def test_checkpoints_resume_with_and_without_the_losses(runs, tmp_path):
    folder, outputs = runs

    def resume(name, *flags):
        # Of the saved run, only what was there after two iterations.
        copy = tmp_path / f"{name}{len(flags)}"
        copy.mkdir()
        (copy / "iter_0000002").symlink_to(folder / name / "iter_0000002")
        (copy / "latest_checkpointed_iteration.txt").write_text("2")
        return _logged(_launch("--train-iters", 4, "--load", copy, *flags))

    uninterrupted = _logged(outputs["losses"])[2:]
    assert resume("losses", *LOSSES) == uninterrupted
    without = resume("losses")
    assert without[0]["lm loss"] == uninterrupted[0]["lm loss"] and "coupling_loss" not in without[0]
    taken_up = resume("plain", *LOSSES)
    assert taken_up[0]["lm loss"] == _logged(outputs["plain"])[2]["lm loss"] and "coupling_loss" in taken_up[0]


def test_model_that_does_not_fit_stops_the_run_by_name():
    with pytest.raises(AssertionError, match="--moe-router-topk is 1"):
        _launch("--train-iters", 1, "--moe-router-topk", 1, "--moe-router-pre-softmax", *LOSSES)


@pytest.mark.parametrize(
    "command, message",
    [
        ([], "usage"),
        (["--cpu"], "usage"),
        (["no_such_script.py"], "no such script: no_such_script.py"),
        (["--unknown", "script.py"], "usage"),
    ],
)
def test_launcher_explains_bad_use(command, message):
    run = subprocess.run(
        [sys.executable, "-m", "megatron_moe_spec.launch", *command], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 2
    assert message in run.stderr
