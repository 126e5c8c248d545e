"""Megatron's own loop by the launcher, with its defaults for Transformer Engine: fused kernels, accumulation fusion."""

import pytest
import torch
from forks import ranks
from processes import ROOT, needs_training_loop
from test_pretrain import LOSSES, MEASURE, MODEL, scalars

pytestmark = [needs_training_loop, pytest.mark.slow]

FLAGS = [flag for flag in MODEL if flag not in ("--transformer-impl", "local") and not flag.startswith("--no-")]
ERC = ["--moe-erc-loss-coeff", "1e-2"]
MORE = [
    "--moe-grouped-gemm",
    "--moe-router-fusion",
    "--bf16",
    "--use-distributed-optimizer",
    "--expert-model-parallel-size",
    2,
]
FP8 = ["--fp8-format", "hybrid", "--fp8-recipe", "tensorwise", "--bf16", "--moe-grouped-gemm"]
FP8 += ["--expert-model-parallel-size", 2]


@pytest.fixture
def run(megatron, tmp_path):
    def run(name, *flags, processes=1):
        folder = tmp_path / name
        save = ["--save", folder, "--save-interval", 4, "--tensorboard-dir", folder]
        launcher = ["-m", "megatron_moe_spec.launch", "--cpu", ROOT / "examples" / "pretrain_gpt.py"]
        ranks(processes, *launcher, *FLAGS, "--train-iters", 4, *save, *flags)
        keys = [
            list(torch.load(file, weights_only=False)["model"]) for file in sorted(folder.rglob("model_optim_rng.pt"))
        ]
        return keys, scalars(folder)

    return run


@pytest.mark.parametrize("flags, processes", [([], 1), (MORE, 2), (FP8, 2)], ids=["sequential", "EP2", "EP2, fp8"])
def test_a_run_by_the_launcher(run, flags, processes):
    keys, plain = run("plain", *flags, processes=processes)
    assert run("zero", *flags, "--moe-coupling-loss-coeff", "0", processes=processes) == (keys, plain)
    trained_keys, logged = run("losses", *flags, *LOSSES, *ERC, *MEASURE, processes=processes)
    assert len(keys) == processes and trained_keys == keys
    for name in ("lm loss", "load_balancing_loss"):
        assert logged[name][1] == plain[name][1]
    assert logged["grad-norm"][1] != plain["grad-norm"][1]
    for name in ("specialization_loss", "coupling_loss", "erc_loss"):
        assert list(logged[name]) == [1, 2, 3, 4]
    assert logged["lm loss"][4] < logged["lm loss"][1]
