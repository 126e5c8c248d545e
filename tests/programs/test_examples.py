"""Every config is what its name says, and every script of examples/ makes a command that Megatron takes."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from forks import program
from processes import ROOT, needs_training_loop

pytest.importorskip("yaml", reason="PyYAML is not installed")
from examples.model_args import model_args

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
NAMES = [config.stem for config in CONFIGS]
# Billions of parameters in total, as published.
PARAMETERS = {
    "tiny": "0.00031",
    "vanilla-0.4b": "0.4",
    "vanilla-1.1b": "1.1",
    "vanilla-7b": "7",
    "deepseek-style-0.4b": "0.4",
    "deepseek-style-1.1b": "1.1",
    "deepseek-style-7b": "7",
    "mixtral-8x7b": "46.7",
    "qwen3-30b-a3b": "30.5",
    "deepseek-v2-lite": "15.7",
}
MOE_LAYERS = {"tiny": 4, "mixtral-8x7b": 32, "qwen3-30b-a3b": 48, "deepseek-v2-lite": 26}
SETTINGS = {
    "single_node": {},
    "multi_node": {"NODES": "4", "MASTER": "node0"},
    "slurm": {"SLURM_JOB_NUM_NODES": "4", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "77"},
    "finetune": {"CHECKPOINT": "base/"},
}


def _script(name: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    return subprocess.run(
        [str(ROOT / "examples" / f"{name}.sh"), *arguments],
        cwd=ROOT,
        env={**environment, "PYTHON": sys.executable, **settings},
        capture_output=True,
        text=True,
    )


def _command(name: str, config: str, *arguments: str, **settings: str) -> list[str]:
    """The command that a script prints with --dry-run."""
    run = _script(name, f"configs/{config}.yaml", "--dry-run", *arguments, **SETTINGS[name], **settings)
    assert run.returncode == 0, run.stderr
    return shlex.split(run.stdout)


def _flags(command: list[str]) -> list[str]:
    """The arguments that the pretraining script gets."""
    return command[command.index(str(ROOT / "examples" / "pretrain_gpt.py")) + 1 :]


def test_every_config_is_tested():
    assert sorted(PARAMETERS) == sorted(NAMES)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Megatron's reading of each config, and of the commands of all scripts."""
    jobs = {name: [2 if name == "tiny" else 32, _flags(_command("single_node", name))] for name in NAMES}
    for script in SETTINGS:
        jobs[script] = [2, _flags(_command(script, "tiny", "--seed", "9"))]
    file = tmp_path_factory.mktemp("configs") / "jobs.json"
    file.write_text(json.dumps(jobs))
    run = program("config_models.py", file)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
@needs_training_loop
@pytest.mark.parametrize("name", NAMES)
def test_config_has_the_parameters_of_its_name(found, name):
    published = PARAMETERS[name]
    decimals = len(published.partition(".")[2])
    assert round(found[name]["total"] / 1e9, decimals) == float(published)
    assert found[name]["coefficients"] == [2e-3, 1e-3]
    if name in MOE_LAYERS:
        assert found[name]["moe_layers"] == MOE_LAYERS[name]
    if name == "qwen3-30b-a3b":
        assert round(found[name]["active"] / 1e9) == 3


@pytest.mark.slow
@needs_training_loop
@pytest.mark.parametrize("script", SETTINGS)
def test_megatron_takes_the_flags_of_every_script(found, script):
    assert found[script]["total"] == found["tiny"]["total"]
    assert found[script]["data_parallel"] == 2


def test_single_node():
    command = _command("single_node", "tiny", "--cpu", GPUS="2", COUPLING_COEFF="0", OUTPUT="out put")
    assert command[:5] == ["torchrun", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node", "2"]
    assert command[5:8] == ["-m", "megatron_moe_spec.launch", "--cpu"]
    flags = _flags(command)
    assert flags[flags.index("--moe-coupling-loss-coeff") + 1] == "0"
    assert flags[flags.index("--save") + 1] == flags[flags.index("--load") + 1] == "out put"
    assert "--mock-data" in flags and "gloo" in flags


def test_data_and_tokenizer_are_passed_on():
    flags = _flags(_command("single_node", "tiny", DATA_PATH="my data", TOKENIZER="gpt2"))
    assert flags[flags.index("--data-path") + 1] == "my data"
    assert flags[flags.index("--tokenizer-model") + 1] == "gpt2"
    assert "--mock-data" not in flags and "NullTokenizer" not in flags


def test_several_nodes():
    for script, endpoint in (("multi_node", "node0:29500"), ("slurm", "localhost:29500")):
        command = _command(script, "mixtral-8x7b")
        assert command[: command.index("torchrun")] == (["srun", "--kill-on-bad-exit=1"] if script == "slurm" else [])
        for flag, value in (("--nnodes", "4"), ("--nproc-per-node", "8"), ("--rdzv-endpoint", endpoint)):
            assert command[command.index(flag) + 1] == value


def test_slurm_asks_for_the_first_host(tmp_path):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\n[ \"$*\" = 'show hostnames n[7-8]' ] && printf 'n7\\nn8\\n'\n")
    scontrol.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    command = _command("slurm", "tiny", PATH=path, SLURM_JOB_NODELIST="n[7-8]")
    assert command[command.index("--rdzv-endpoint") + 1] == "n7:29500"


def test_finetuning_starts_from_the_checkpoint_and_resumes_its_own():
    flags = _flags(_command("finetune", "tiny"))
    assert flags[flags.index("--pretrained-checkpoint") + 1] == "base/"
    assert flags[flags.index("--load") + 1] == flags[flags.index("--save") + 1] == "base-finetuned"


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        ("single_node", [], "usage"),
        ("single_node", ["--dry-run", "configs/tiny.yaml"], "usage"),
        ("single_node", ["no_such.yaml", "--dry-run"], "no_such.yaml"),
        ("single_node", ["README.md", "--dry-run"], "README.md"),
        ("multi_node", ["configs/tiny.yaml", "--dry-run"], "MASTER"),
        ("finetune", ["configs/tiny.yaml", "--dry-run"], "CHECKPOINT"),
    ],
)
def test_bad_use_is_explained(script, arguments, message):
    run = _script(script, *arguments, **({"NODES": "2"} if script == "multi_node" else {}))
    assert run.returncode in (1, 2, 127) and message in run.stderr and not run.stdout


@pytest.mark.parametrize(
    "text, message",
    [("ENV_VARS: {}", "MODEL_ARGS"), ("MODEL_ARGS:\n  seed: 1", "seed"), ("MODEL_ARGS:\n  --seed:", "--seed")],
)
def test_bad_config_is_explained(tmp_path, text, message):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        model_args(str(file))


def test_values_become_arguments(tmp_path):
    file = tmp_path / "some.yaml"
    file.write_text("MODEL_ARGS:\n  --swiglu: true\n  --bf16: false\n  --lr: 1.0e-3\n  --data-path: [a, 0.5]\n")
    assert model_args(str(file)) == ["--swiglu", "--lr", "0.001", "--data-path", "a", "0.5"]


@pytest.mark.slow
@needs_training_loop
def test_tiny_model_trains_and_is_fine_tuned(tmp_path):
    settings = {
        "OUTPUT": str(tmp_path / "base"),
        "GPUS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
    }
    short = ["configs/tiny.yaml", "--cpu", "--train-iters", "2", "--lr-warmup-iters", "1"]
    short += ["--log-interval", "1", "--ckpt-format", "torch"]
    first = _script("single_node", *short, **settings)
    assert first.returncode == 0, first.stderr[-4000:]
    settings.update(CHECKPOINT=settings["OUTPUT"], OUTPUT=str(tmp_path / "tuned"))
    second = _script("finetune", *short, **settings)
    assert second.returncode == 0, second.stderr[-4000:]
    assert "successfully loaded checkpoint" in second.stdout
    for run in (first, second):
        assert run.stdout.count(" coupling_loss: ") == 2
