"""An unedited pretraining script through Megatron's own loop, the launcher and the CPU backend."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from forks import ranks
from processes import ROOT, needs_training_loop, python

pytestmark = [needs_training_loop, pytest.mark.slow]

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
MEASURE = ["--moe-spec-metrics-interval", "2"]
TRACE = ["--moe-spec-trace-interval", "2", "--moe-spec-trace-path"]


def launch(*flags, processes=1, script="pretrain_gpt.py") -> str:
    launcher = ["-m", "megatron_moe_spec.launch", "--cpu", ROOT / "examples" / script]
    return ranks(processes, *launcher, *MODEL, *flags)


def scalars(folder) -> dict[str, dict[int, float]]:
    """Everything in a folder's TensorBoard files but what depends on the clock: name -> iteration -> value.

    The console's line would not do: Megatron's second one averages the first two iterations. Validation after the last
    iteration is left out: Megatron does not flush it, and the process may end first.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        name: {event.step: event.value for event in events.Scalars(name)}
        for name in events.Tags()["scalars"]
        if not any(word in name for word in ("time", "vs", "validation"))
    }


@pytest.fixture(scope="module")
def runs(megatron, tmp_path_factory):  # megatron: reading a checkpoint imports it, after the CPU backend alone
    """Four iterations without flags, with coefficients 0, and with the losses; checkpoints after two and four."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name, *flags):
        save = ["--save", folder / name, "--save-interval", 2, "--tensorboard-dir", folder / name]
        return launch("--train-iters", 4, *save, *flags)

    outputs = {
        "plain": run("plain"),
        "zero": run("zero", "--moe-specialization-loss-coeff", "0", "--moe-coupling-loss-coeff", "0"),
        "losses": run("losses", *LOSSES, *MEASURE, *TRACE, folder / "traces", "--moe-per-layer-logging"),
    }
    return folder, outputs


def _weights(folder, iteration) -> dict:
    (file,) = folder.glob(f"iter_{iteration:07d}/*/model_optim_rng.pt")
    return torch.load(file, weights_only=False)["model"]


def test_first_forward_is_the_same_with_the_losses(runs):
    folder, _ = runs
    plain, losses = scalars(folder / "plain"), scalars(folder / "losses")
    for name in ("lm loss", "load_balancing_loss"):
        assert losses[name][1] == plain[name][1]
    assert losses["grad-norm"][1] != plain["grad-norm"][1]


def test_zero_coefficients_give_a_bitwise_equal_run(runs):
    folder, _ = runs
    assert scalars(folder / "zero") == scalars(folder / "plain")
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
    folder, outputs = runs
    logged = scalars(folder / "losses")
    for name in ("specialization_loss", "coupling_loss"):
        assert list(logged[name]) == [1, 2, 3, 4]
        (first,) = re.findall(rf"iteration +1/.* {name}: (\S+)", outputs["losses"])
        assert float(first) == pytest.approx(logged[name][1], rel=1e-5)
        assert len(re.findall(rf"iteration +\d/.* {name}: ", outputs["losses"])) == 4
        assert f" {name}: " not in outputs["plain"] and name not in scalars(folder / "plain")
    assert list(logged["moe_spec/routing_entropy/layer_1"]) == [2, 4]
    assert list(logged["moe_spec/conditional_entropy/layers_0_1"]) == [2, 4]


def test_metrics_file(runs):
    folder, _ = runs
    lines = [json.loads(line) for line in (folder / "losses" / "moe_spec_metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [2, 4]
    logged = scalars(folder / "losses")
    for line in lines:
        for name in ("specialization_loss", "coupling_loss"):
            assert line[name] == pytest.approx(logged[name][line["iteration"]], rel=1e-6)
        assert [layer["layer"] for layer in line["layers"]] == [0, 1]
        assert all(0 < layer["mean_abs_cos"] <= layer["max_abs_cos"] <= 1 for layer in line["layers"])
        assert all(layer["load_imbalance"] >= 1 for layer in line["layers"])
        assert [pair["layers"] for pair in line["pairs"]] == [[0, 1]]


def test_each_layer_s_losses_are_logged_beside_megatron_s_own(runs):
    folder, _ = runs
    logged = scalars(folder / "losses")
    assert list(logged["moe/load_balancing_loss_layer_1"]) == [1, 2, 3, 4]
    layers = [logged[f"moe/specialization_loss_layer_{layer}"] for layer in (0, 1)]
    for iteration in (1, 2, 3, 4):
        mean = sum(layer[iteration] for layer in layers) / 2
        assert mean == pytest.approx(logged["specialization_loss"][iteration], rel=1e-5)
        assert logged["moe/coupling_loss_layer_0"][iteration] == pytest.approx(
            logged["coupling_loss"][iteration], rel=1e-5
        )
    assert "moe/coupling_loss_layer_1" not in logged and not any("_layer_" in name for name in scalars(folder / "zero"))


def test_routing_is_traced(runs):
    from megatron_moe_spec.traces.counts import loads
    from megatron_moe_spec.traces.files import read_trace

    folder, outputs = runs
    assert f"traced every 2 iterations to {folder / 'traces'}" in outputs["losses"]
    trace = read_trace(folder / "traces")
    assert (trace.layers, trace.num_experts, len(trace.experts_TMK)) == ((0, 1), 4, 2 * 4 * 32)
    lines = [json.loads(line) for line in (folder / "losses" / "moe_spec_metrics.jsonl").read_text().splitlines()]
    for number, layer in enumerate(loads(trace).tolist()):
        assert layer == [sum(loads) for loads in zip(*(line["layers"][number]["load"] for line in lines))]


def test_checkpoints_resume_with_and_without_the_losses(runs, tmp_path):
    folder, _ = runs

    def resume(name, *flags):
        # Of the saved run, only what was there after two iterations.
        copy = tmp_path / f"{name}{len(flags)}"
        copy.mkdir()
        (copy / "iter_0000002").symlink_to(folder / name / "iter_0000002")
        (copy / "latest_checkpointed_iteration.txt").write_text("2")
        launch("--train-iters", 4, "--load", copy, "--tensorboard-dir", copy, *flags)
        return scalars(copy)

    plain, losses = scalars(folder / "plain"), scalars(folder / "losses")
    resumed = resume("losses", *LOSSES)
    for name in ("lm loss", "specialization_loss", "coupling_loss", "grad-norm"):
        assert resumed[name] == {iteration: losses[name][iteration] for iteration in (3, 4)}
    without = resume("losses")
    assert without["lm loss"][3] == losses["lm loss"][3] and "coupling_loss" not in without
    taken_up = resume("plain", *LOSSES)
    assert taken_up["lm loss"][3] == plain["lm loss"][3] and "coupling_loss" in taken_up


def test_checkpoints_are_saved_by_a_worker_process(tmp_path):
    pytest.importorskip("psutil", reason="psutil is not installed, which saving torch_dist checkpoints needs")
    worker = ["--async-save", "--use-persistent-ckpt-worker", "--ckpt-format", "torch_dist"]
    training = Path(find_spec("megatron.training").origin).parent
    if any("async_strategy" in file.read_text() for file in training.rglob("*.py")):  # from 0.19
        worker += ["--async-strategy", "mcore"]
    # NCCL is Megatron's default backend.
    flags = ["--train-iters", 2, *LOSSES, "--distributed-backend", "nccl"]
    launch(*flags, *worker, "--save", tmp_path, "--save-interval", 1)
    latest = tmp_path / "latest_checkpointed_iteration.txt"
    assert latest.read_text() == "2"
    latest.write_text("1")
    resumed = launch(*flags, "--load", tmp_path, "--ckpt-format", "torch_dist")
    assert re.findall(r"iteration +(\d)/ +2 .*coupling_loss", resumed) == ["2"]


def test_model_that_does_not_fit_stops_the_run_by_name():
    with pytest.raises(AssertionError, match="--moe-router-topk is 1"):
        launch("--train-iters", 1, "--moe-router-topk", 1, "--moe-router-pre-softmax", *LOSSES)


def test_skipped_iterations_move_no_measurement(tmp_path):
    launch("--train-iters", 8, "--tensorboard-dir", tmp_path, *LOSSES, *MEASURE, "--iterations-to-skip", 1, 3, 6)
    lines = [json.loads(line) for line in (tmp_path / "moe_spec_metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [2, 4, 8]
    logged = scalars(tmp_path)["coupling_loss"]
    assert list(logged) == [2, 4, 5, 7, 8]
    assert all(line["coupling_loss"] == pytest.approx(logged[line["iteration"]], rel=1e-6) for line in lines)


def test_full_disk_does_not_end_a_run(tmp_path):
    (tmp_path / "moe_spec_metrics.jsonl").symlink_to("/dev/full")
    output = launch("--train-iters", 4, "--tensorboard-dir", tmp_path, *LOSSES, *MEASURE, processes=2)
    assert re.search(r"iteration +4/ +4 .*coupling_loss", output)
    assert output.count("moe_spec_metrics.jsonl cannot be written (No space left on device)") == 1


def test_metrics_that_cannot_be_written_stop_the_run_before_it_trains(tmp_path):
    (tmp_path / "moe_spec_metrics.jsonl").mkdir()
    remedy = "set --tensorboard-dir, or --save, to another folder, or --moe-spec-metrics-interval to 0"
    with pytest.raises(AssertionError, match=remedy) as ended:
        launch("--train-iters", 4, "--tensorboard-dir", tmp_path, *LOSSES, *MEASURE, processes=2)
    assert "Is a directory" in str(ended.value) and "iteration        1/" not in str(ended.value)


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
    run = python("-m", "megatron_moe_spec.launch", *command)
    assert run.returncode == 2
    assert message in run.stderr
