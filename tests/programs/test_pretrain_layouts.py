"""Megatron's training loop under parallel layouts, by the launcher: the same logged losses of the same weights."""

import pytest
from processes import needs_training_loop
from test_pretrain import LOSSES, launch, scalars

pytestmark = [needs_training_loop, pytest.mark.slow]

# The vocabulary is padded to a multiple of this and the tensor-parallel size: to 64 either way.
VOCABULARY = ["--make-vocab-size-divisible-by", 32]
TRAINING = ["--global-batch-size", 8, "--lr", "1e-3", "--ckpt-format", "torch_dist"]
SETTINGS = ["--num-layers", 4, *VOCABULARY, *TRAINING, *LOSSES]
INTERLEAVED = ["--pipeline-model-parallel-size", 2, "--num-layers-per-virtual-pipeline-stage", 1]
# name -> (processes, flags)
LAYOUTS = {
    "EP2": (2, ["--expert-model-parallel-size", 2]),
    "TP2+SP, EP2": (
        4,
        ["--tensor-model-parallel-size", 2, "--sequence-parallel", "--expert-model-parallel-size", 2],
    ),
    "PP2+VPP2": (2, INTERLEAVED),
}
ITERATIONS = 20
NAMES = ("lm loss", "load_balancing_loss", "specialization_loss", "coupling_loss")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """``train(layout, name, flags)`` -> the logged values by iteration, and the folder of the checkpoints."""
    folder = tmp_path_factory.mktemp("layouts")
    done = {}

    def train(layout, name, *flags):
        if (layout, name) not in done:
            processes, sizes = LAYOUTS[layout]
            run = folder / f"{layout}, {name}"
            launch(*SETTINGS, *sizes, "--tensorboard-dir", run, *flags, processes=processes)
            done[layout, name] = scalars(run)
        return done[layout, name]

    train("EP2", "weights", "--train-iters", 1, "--save", folder / "weights", "--save-interval", 1)
    save = ["--save", folder / "trained", "--save-interval", ITERATIONS]
    train("EP2", "training", *_from(folder / "weights"), *save)
    return folder, train


def _from(weights) -> list:
    """Trains on these weights from the first sample on, with a fresh optimizer."""
    return ["--train-iters", ITERATIONS, "--load", weights, "--finetune", "--no-load-optim", "--no-load-rng"]


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_layouts_log_the_same_losses(trained, layout):
    folder, train = trained
    expected, found = train("EP2", "training"), train(layout, "training", *_from(folder / "weights"))
    for name in NAMES:
        assert list(found[name]) == list(range(1, ITERATIONS + 1)), name
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name
    first, last = found["specialization_loss"][1], found["specialization_loss"][ITERATIONS]
    assert last < first, "the losses were not trained"


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_checkpoint_resumes_under_another_layout(trained, layout):
    folder, train = trained
    resume = ["--train-iters", ITERATIONS + 1, "--load", folder / "trained", "--use-checkpoint-opt-param-scheduler"]
    # Megatron cannot load the optimizer's state of an expert-parallel run without expert parallelism.
    weights_alone = ["--no-load-optim", "--no-load-rng"] if layout == "PP2+VPP2" else []
    expected, found = train("EP2", "resumed", *resume), train(layout, "resumed", *resume, *weights_alone)
    for name in NAMES:
        assert list(found[name]) == [ITERATIONS + 1]
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name
