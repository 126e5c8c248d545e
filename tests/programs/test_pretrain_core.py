"""examples/pretrain_core.py: the losses in a training loop of one's own, in one process and in two."""

import json
import random

import pytest
from forks import ranks
from processes import ROOT

pytestmark = pytest.mark.slow

ITERATIONS = 12
LOSSES = ["--moe-specialization-loss-coeff", "1.0", "--moe-coupling-loss-coeff", "0.1"]
MEASURE = ["--moe-spec-metrics-interval", "4"]


def write_dataset(prefix):
    """200 documents of words from a small vocabulary, as bytes, in Megatron's indexed format."""
    import numpy
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    words = "the router sends each token to its two experts and they learn what others do not".split()
    source = random.Random(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    for _ in range(200):
        text = " ".join(source.choices(words, k=60)).encode()
        builder.add_document([*text, 256], [len(text) + 1])
    builder.finalize(f"{prefix}.idx")


@pytest.fixture(scope="module")
def runs(megatron, tmp_path_factory):
    """Output folders by name: two processes without and with the losses, one process with them."""
    folder = tmp_path_factory.mktemp("pretrain_core")
    write_dataset(folder / "words")

    def run(name, processes, *flags):
        output = ranks(
            processes, ROOT / "examples" / "pretrain_core.py", "--cpu",
            "--data-path", folder / "words", "--output", folder / name, "--iterations", ITERATIONS, "--seed", 3,
            "--num-layers", 3, "--hidden-size", 32, "--seq-length", 32, "--num-experts", 8,
            "--moe-ffn-hidden-size", 32, "--moe-shared-expert-intermediate-size", 32,
            "--micro-batch-size", 2, "--lr-warmup-iters", 2, "--eval-interval", 5, "--eval-iters", 3,
            *flags,
        )  # fmt: skip
        (folder / name / "stdout.txt").write_text(output)

    run("plain", 2)
    run("measured", 2, *MEASURE)
    run("losses", 2, *LOSSES, *MEASURE)
    run("one_process", 1, *LOSSES)
    return folder


def log(folder, file="log.jsonl"):
    return [json.loads(line) for line in (folder / file).read_text().splitlines()]


def column(folder, name):
    return [record[name] for record in log(folder)]


@pytest.mark.parametrize("name", ["plain", "losses", "one_process"])
def test_language_model_learns(runs, name):
    losses = column(runs / name, "lm_loss")
    assert losses[0] > 5.0
    assert losses[-1] < losses[0] - 1.0


def test_log_is_complete(runs):
    always = {"iteration", "lm_loss", "step_time_s"}
    auxiliary = {"specialization_loss", "coupling_loss"}
    for name, expected in (("plain", set()), ("losses", auxiliary), ("one_process", auxiliary)):
        records = log(runs / name)
        assert [record["iteration"] for record in records] == list(range(1, ITERATIONS + 1))
        for record in records:
            evaluated = {"validation_loss"} if record["iteration"] in (5, 10, ITERATIONS) else set()
            assert set(record) == always | expected | evaluated
            assert record["step_time_s"] > 0
        assert f"iteration 10/{ITERATIONS} " in (runs / name / "stdout.txt").read_text()
    assert not (runs / "plain" / "moe_spec_metrics.jsonl").exists()


def test_validation_loss_is_of_the_size_of_the_training_loss(runs):
    for name in ("plain", "losses", "one_process"):
        for record in log(runs / name):
            if "validation_loss" in record:
                # Generated text: training and validation are of one kind, and nothing can be memorised this soon.
                assert record["validation_loss"] == pytest.approx(record["lm_loss"], rel=0.1)


def test_metrics_file_is_complete(runs):
    for name in ("measured", "losses"):
        records = log(runs / name, "moe_spec_metrics.jsonl")
        assert [record["iteration"] for record in records] == [4, 8, 12]
        logged = {record["iteration"]: record for record in log(runs / name)}
        for record in records:
            assert set(record) == {"iteration", "specialization_loss", "coupling_loss", "layers", "pairs"}
            assert [layer["layer"] for layer in record["layers"]] == [0, 1, 2]
            assert [pair["layers"] for pair in record["pairs"]] == [[0, 1], [1, 2]]
            for loss in ("specialization_loss", "coupling_loss"):
                assert record[loss] == logged[record["iteration"]][loss]


def test_flags_leave_the_first_forward_pass_as_it_is(runs):
    first = column(runs / "plain", "lm_loss")
    trained = column(runs / "losses", "lm_loss")
    assert trained[0] == first[0]
    assert trained[1:] != first[1:]


def test_measuring_alone_leaves_the_training_as_it_is(runs):
    assert column(runs / "measured", "lm_loss") == column(runs / "plain", "lm_loss")


def test_losses_end_lower_with_their_coefficients(runs):
    without, trained = (log(runs / name, "moe_spec_metrics.jsonl")[-1] for name in ("measured", "losses"))
    assert trained["specialization_loss"] < 0.5 * without["specialization_loss"]
    assert trained["coupling_loss"] < without["coupling_loss"]


def test_two_processes_train_as_one(runs):
    """Four micro-batches in one process, two in each of two: only the order of summation differs."""
    for name in ("lm_loss", "specialization_loss", "coupling_loss"):
        one, two = column(runs / "one_process", name), column(runs / "losses", name)
        assert two[0] == pytest.approx(one[0], rel=1e-6), name
        assert two == pytest.approx(one, rel=1e-4), name
