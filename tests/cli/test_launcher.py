"""The launcher never runs silently without the losses, and says what to type."""

import importlib

import pytest
from forks import program
from processes import needs_training_loop, python

from megatron_moe_spec import SpecConfig, attach

LAUNCHER = "-m megatron_moe_spec.launch"
COUPLING = ["--moe-coupling-loss-coeff", "1e-3"]
# As torchrun sets them for one process.
STARTED = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
# By one of these the launcher knows that a job was started.
NOT_STARTED = dict.fromkeys((*STARTED, "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"))


def test_training_without_the_losses_asked_for_is_stopped(mm, monkeypatch):
    from megatron_moe_spec.integration.attach import SpecHandle
    from megatron_moe_spec.integration.training import AttachedGuard

    schedules = importlib.import_module("megatron.core.pipeline_parallel.schedules")
    names = [
        "forward_backward_no_pipelining",
        "forward_backward_pipelining_with_interleaving",
        "forward_backward_pipelining_without_interleaving",
    ]
    for name in names:

        def schedule(*, forward_only=False, name=name):
            return name

        schedule.__name__ = name
        # raising=True: Megatron has it.
        monkeypatch.setattr(schedules, name, schedule)
    monkeypatch.setattr(SpecHandle, "ever_attached", False)
    asked = [True]
    guard = AttachedGuard(lambda: asked[0])
    for name in names:
        schedule = getattr(schedules, name)
        for forward_pass in ({}, {"forward_only": False}):
            with pytest.raises(RuntimeError, match=r"attach\(model, SpecConfig\(...\)\).* patches/"):
                schedule(**forward_pass)
        assert schedule(forward_only=True) == name
        asked[0] = False
        assert schedule() == name
        asked[0] = True
    assert schedules.get_forward_backward_func() is schedules.forward_backward_no_pipelining
    model = mm.build_model()
    attach(model, SpecConfig())
    with pytest.raises(RuntimeError):
        schedules.get_forward_backward_func()()
    attach(model, SpecConfig(coupling_loss_coeff=1.0)).detach()
    assert [getattr(schedules, name)() for name in names] == names
    monkeypatch.setattr(SpecHandle, "ever_attached", False)
    del guard  # as long as it lives
    assert [getattr(schedules, name)() for name in names] == names


@pytest.mark.slow
@needs_training_loop
@pytest.mark.parametrize("end", ["", "import sys; sys.exit(0)", "import sys; sys.argv = sys.argv[:1]"])
def test_script_that_attached_nothing_fails(end, tmp_path):
    script = tmp_path / "own_loop.py"
    script.write_text(f"print('trained')\n{end}\n")
    run = program(*LAUNCHER.split(), "--cpu", script, *COUPLING, **STARTED)
    assert run.stdout.endswith("trained\n")
    assert run.returncode == 1 and "attached to no model" in run.stderr and "patches/" in run.stderr


@pytest.mark.slow
@needs_training_loop
def test_script_without_losses_may_do_as_it_likes(tmp_path):
    script = tmp_path / "other.py"
    script.write_text("import sys; sys.exit(sys.argv[1:] == ['--fail'] and 7)")
    assert program(*LAUNCHER.split(), "--cpu", script, **STARTED).returncode == 0
    assert program(*LAUNCHER.split(), "--cpu", script, "--fail", **STARTED).returncode == 7


@pytest.mark.slow
@needs_training_loop
def test_script_that_attaches_the_losses_itself(tmp_path):
    script = tmp_path / "own_loop.py"
    script.write_text(
        "import megatron_models as mm\n"
        "from megatron_moe_spec import SpecConfig, attach\n"
        f"mm.initialize_one_rank({str(tmp_path / 'store')!r})\n"
        "attach(mm.build_model(), SpecConfig(coupling_loss_coeff=1e-3))\n"
    )
    run = program(*LAUNCHER.split(), "--cpu", script, *COUPLING, **STARTED)
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "command, variables, message",
    [
        (["--cpu", "SCRIPT", *COUPLING], {}, f"torchrun --nproc-per-node PROCESSES {LAUNCHER} --cpu SCRIPT"),
        (["SCRIPT", "--lr", "1e-3"], {}, f"{LAUNCHER} SCRIPT --lr 1e-3"),
        (["SCRIPT", *COUPLING], STARTED, "put --cpu before the script: torchrun"),
        (["SCRIPT", "--moe-coupling-loss-coeff", "-2e-3"], STARTED, "--moe-coupling-loss-coeff) must be finite"),
        (["SCRIPT", "--moe-coupling-loss-coeff", "much"], STARTED, "--moe-coupling-loss-coeff: invalid float value"),
    ],
)
def test_launcher_says_what_to_type(command, variables, message, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("raise AssertionError('the script runs')")
    command = [str(script) if word == "SCRIPT" else word for word in command]
    run = python("-W", "ignore", *LAUNCHER.split(), *command, CUDA_VISIBLE_DEVICES="", **{**NOT_STARTED, **variables})
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert message.replace("SCRIPT", str(script)) in line
