"""The doctor says before a run what attach() would say in it."""

import importlib.util
import os
import sys

import pytest
from processes import needs_training_loop, python
from test_pretrain import MODEL

from megatron_moe_spec import doctor

LOSSES = ["--moe-specialization-loss-coeff", "1e-3", "--moe-coupling-loss-coeff", "1e-4"]


@pytest.fixture
def diagnose(megatron, capsys, monkeypatch):
    """Runs the doctor in this process; gives its exit status, its report, and the rows of the report by name."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")

    def run(*flags):
        status = doctor.main(list(map(str, flags)))
        report = capsys.readouterr().out
        rows = {line[2:22].strip(): line[23:] for line in report.splitlines() if line.startswith("  ")}
        return status, report, rows

    return run


@needs_training_loop
def test_usable_model(diagnose):
    status, report, rows = diagnose(*MODEL, *LOSSES, "--expert-model-parallel-size", 2)
    assert status == 0 and report.endswith("\nusable\n") and "refused" not in report
    assert rows["losses"] == "specialization x 0.001, coupling (mass, exact) x 0.0001"
    assert rows["MoE layers"].startswith("2 of 2, 4 experts, 2 for each token")
    assert rows["activation tap"] == "input of each local expert's linear_fc2 (SequentialMLP)"
    assert rows["dispatcher"] == "alltoall; rows are returned from 2 expert-parallel ranks"
    assert rows["kernels"].startswith("Triton on the GPU; here eager PyTorch (Triton cannot run: they need an NVIDIA")
    assert rows["assumed"] == "a GPU of capability 9.0 (not installed here)"
    if importlib.util.find_spec("transformer_engine") is None:
        assert "needed by models of --transformer-impl transformer_engine" in rows["transformer-engine"]


@needs_training_loop
def test_both_readings_of_the_specialization_coefficient(diagnose):
    """As a mean over the ordered pairs of 8 experts, and as their sum."""
    top_8 = [*RECIPE, *LOSSES[2:]]
    assert diagnose(*top_8, "--moe-specialization-loss-coeff", 2e-3)[2]["specialization"] == (
        "0.002 x the mean over a token's 56 ordered pairs of experts = 3.57e-05 x their sum; the paper's 2e-3 is of "
        "the sum, by second-hand accounts: --moe-specialization-loss-coeff 0.112 here"
    )
    readings = diagnose(*top_8, "--moe-specialization-loss-coeff", 0.112)[2]["specialization"]
    assert readings.startswith("0.112 x the mean over a token's 56 ordered pairs of experts = 0.002 x their sum;")
    assert diagnose(*MODEL)[2]["specialization"].endswith(" 0.004 here")
    assert "specialization" not in diagnose(*top_8)[2]
    one = diagnose(*MODEL, *LOSSES, "--moe-router-topk", 1, "--moe-router-pre-softmax")[2]
    assert "specialization" not in one


@needs_training_loop
def test_without_the_flags_both_losses_are_assumed(diagnose):
    status, _, rows = diagnose(*MODEL)
    assert status == 0
    assert rows["losses"].startswith("specialization x 0.002, coupling (mass, exact) x 0.001 (assumed")


@needs_training_loop
def test_where_a_coefficient_is_given_none_is_assumed(diagnose):
    status, _, rows = diagnose(*MODEL, "--moe-specialization-loss-coeff=0")
    assert status == 0 and rows["losses"] == "none"
    assert diagnose(*MODEL, "--moe-spec-metrics-interval", 5)[2]["losses"] == "none, measuring alone"
    traced = diagnose(*MODEL, "--moe-spec-trace-path", "traces")[2]
    assert (traced["losses"], traced["traces"]) == ("none", "every 100 iterations to traces")


RECIPE = """
    --num-layers 4 --hidden-size 2048 --num-attention-heads 16 --ffn-hidden-size 6144 --seq-length 4096
    --max-position-embeddings 4096 --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
    --num-experts 64 --moe-router-topk 8 --moe-ffn-hidden-size 768 --moe-grouped-gemm --moe-permute-fusion
    --moe-router-fusion --expert-model-parallel-size 8 --moe-token-dispatcher-type alltoall
    --transformer-impl transformer_engine --bf16 --micro-batch-size 1 --global-batch-size 256 --train-iters 1000
    --lr 1e-4 --tokenizer-type HuggingFaceTokenizer --tokenizer-model no/such/folder --data-path no/such/file
    --load no/such/checkpoint --split 99,1,0
""".split()
FSDP = ["--use-megatron-fsdp", "--use-distributed-optimizer", "--ckpt-format", "fsdp_dtensor"]


@needs_training_loop
@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--tensor-model-parallel-size", 2, "--sequence-parallel", "--tp-comm-overlap"],
        FSDP,
        ["--overlap-moe-expert-parallel-comm", "--delay-wgrad-compute"],
    ],
)
def test_any_machine_judges_the_flags_of_a_cluster(diagnose, flags):
    status, report, rows = diagnose(*RECIPE, *LOSSES, *flags)
    assert status == 0, report
    if importlib.util.find_spec("transformer_engine") is None:
        assert rows["assumed"].startswith("transformer-engine, ")
        assert rows["activation tap"] == "input of linear_fc2 of all local experts (TEGroupedMLP)"


@needs_training_loop
def test_where_the_losses_read_beside_graphs_and_quantized_rows(diagnose):
    _, _, rows = diagnose(*RECIPE)
    assert rows["router tap"] == "TopKRouter.routing" and "kept until backward" not in rows
    graphs = ["--cuda-graph-impl", "transformer_engine", "--cuda-graph-scope", "moe_router"]
    status, report, rows = diagnose(*RECIPE, *graphs, "--fp8-format", "e4m3", "--fp8-recipe", "blockwise")
    assert status == 0, report
    assert rows["router tap"].startswith("MoELayer.preprocess")
    assert rows["kept until backward"].startswith(f"{2 * 8 * 768} bytes a token and layer")
    recompute = ["--recompute-granularity", "selective", "--recompute-modules", "moe_act"]
    assert "kept until backward" not in diagnose(*RECIPE, "--fp8-format", "e4m3", *recompute)[2]


@needs_training_loop
def test_what_is_assumed_is_forgotten(diagnose):
    from megatron.core import utils

    from megatron_moe_spec.integration.compat.assumed import has_transformer_engine

    before = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")
    diagnose(*RECIPE)
    assert has_transformer_engine() == (importlib.util.find_spec("transformer_engine") is not None)
    assert utils.is_te_min_version.__module__ == utils.__name__
    assert os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == before
    for module in list(sys.modules.values()):
        assert "assumed" not in getattr(getattr(module, "is_te_min_version", None), "__module__", ""), module


@needs_training_loop
def test_sharded_weights_are_refused(diagnose):
    status, report, _ = diagnose(*RECIPE, *FSDP, "--moe-erc-loss-coeff", 1)
    assert status == 1 and "--moe-erc-loss-coeff to 0" in report


@needs_training_loop
def test_notices(diagnose):
    overlap = ["--pipeline-model-parallel-size", 2, "--num-layers-per-virtual-pipeline-stage", 2, "--num-layers", 8]
    overlap += ["--overlap-moe-expert-parallel-comm"]
    status, report, rows = diagnose(*RECIPE, *overlap, "--moe-router-force-load-balancing")
    assert status == 0, report
    assert "--moe-router-force-load-balancing replaces" in rows["1"]
    assert "different pipeline stages (3 of 7) are neither" in rows["2"] and "--overlap-moe-expert" in rows["2"]
    assert "coupling (mass, drop)" in rows["losses"]
    status, report, rows = diagnose(*RECIPE, *overlap, *LOSSES, "--moe-coupling-across-stages", "exact")
    assert status == 1 and "--moe-coupling-across-stages auto or drop" in rows["1"]


@needs_training_loop
@pytest.mark.parametrize(
    "flags, remedy",
    [
        (["--moe-router-topk", 1, "--moe-router-pre-softmax"], "--moe-router-topk is 1"),
        (["--num-layers", 1], "--moe-coupling-loss-coeff to 0"),
        (["--moe-layer-freq", "[0,1]"], "--moe-coupling-loss-coeff to 0"),
        (["--moe-layer-freq", 0], "--moe-layer-freq is 0"),
        (["--moe-specialization-loss-coeff", -1], "--moe-specialization-loss-coeff"),
        (["--expert-tensor-parallel-size", 2], "--expert-tensor-parallel-size 2 is larger"),
    ],
)
def test_refusals(diagnose, flags, remedy):
    status, report, _ = diagnose(*MODEL, *LOSSES, *flags)
    assert status == 1 and report.endswith("\nrefused\n")
    assert remedy in report


@needs_training_loop
def test_every_refusal_is_listed(diagnose):
    status, _, rows = diagnose(*MODEL, *LOSSES, "--num-layers", 1, "--expert-tensor-parallel-size", 2)
    assert status == 1
    assert "two MoE layers" in rows["1"] and "--expert-tensor-parallel-size" in rows["2"]


@needs_training_loop
def test_kernels(diagnose, monkeypatch):
    def row(kernels):
        status, _, rows = diagnose(*MODEL, *LOSSES, "--moe-spec-kernels", kernels)
        assert status == 0
        return rows["kernels"]

    assert row("torch") == "eager PyTorch"
    assert row("triton").startswith("Triton on the GPU; here refused (")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert row("triton") == "Triton on the GPU"


@needs_training_loop
def test_dense_model(diagnose):
    dense = MODEL[: MODEL.index("--num-experts")] + MODEL[MODEL.index("--transformer-impl") :]
    status, report, _ = diagnose(*dense)
    assert status == 1 and "set --num-experts" in report and "would be used" not in report
    status, report, _ = diagnose(*dense, "--moe-specialization-loss-coeff", 0)
    assert status == 0 and "would be used" not in report
    measured = ["--moe-spec-metrics-interval", 1, "--moe-spec-trace-path", "traces"]
    status, report, _ = diagnose(*dense, "--moe-specialization-loss-coeff", 0, *measured)
    assert status == 1 and "or leave out --moe-spec-metrics-interval and --moe-spec-trace-path)" in report


@needs_training_loop
@pytest.mark.parametrize(
    "flags, numbers",
    [
        (["--pipeline-model-parallel-size", 2], [2, 2]),
        (["--pipeline-model-parallel-size", 2, "--moe-layer-freq", "[0,1,1,1]"], [1, 2]),
        (["--pipeline-model-parallel-size", 2, "--moe-layer-freq", 2], [1, 1]),
        (["--pipeline-model-parallel-size", 2, "--decoder-first-pipeline-num-layers", 1], [1, 3]),
        (["--pipeline-model-parallel-size", 2, "--num-layers-per-virtual-pipeline-stage", 1], [1, 1, 1, 1]),
        (["--pipeline-model-parallel-size", 2, "--pipeline-model-parallel-layout", "Et|t*3L"], [1, 3]),
    ],
)
def test_moe_layers_of_pipeline_stages(diagnose, flags, numbers):
    status, report, rows = diagnose(*MODEL, *LOSSES, "--num-layers", 4, *flags)
    assert status == 0, report
    assert rows["MoE layers"].endswith(f"by pipeline stage {numbers}")
    number, within = sum(numbers) - 1, sum(max(layers - 1, 0) for layers in numbers)
    assert rows["pairs"] == f"{number} of consecutive MoE layers, {number - within} of them across pipeline stages"


@needs_training_loop
@pytest.mark.parametrize(
    "pattern, ranks, layers, stages, pairs",
    [
        ("*E*E", 1, "2 of 4", None, "1 of consecutive MoE layers"),
        ("*E*-", 1, "1 of 4", None, None),
        ("*E|*E*E", 2, "3 of 6", [1, 2], "2 of consecutive MoE layers, 1 of them across pipeline stages"),
        ("*E*E*E*E", 2, "4 of 8", [2, 2], "3 of consecutive MoE layers, 1 of them across pipeline stages"),
        ("*E|M-|*EE|E", 2, "4 of 8", [1, 0, 2, 1], "3 of consecutive MoE layers, 2 of them across pipeline stages"),
        ("*EE/*E/*E", 1, "2 of 3", None, "1 of consecutive MoE layers"),  # MTP layers take no part
    ],
)
def test_moe_layers_of_a_hybrid_model(diagnose, pattern, ranks, layers, stages, pairs):
    flags = MODEL[2:] if MODEL[0] == "--num-layers" else MODEL
    losses = LOSSES if pairs else LOSSES[:2]
    pipeline = ["--pipeline-model-parallel-size", ranks]
    status, report, rows = diagnose(*flags, "--hybrid-layer-pattern", pattern, *pipeline, *losses)
    if "unrecognized arguments: --hybrid-layer-pattern" in report:
        pytest.skip("this Megatron describes hybrid models by other flags")
    assert status == 0, report
    assert rows["MoE layers"].startswith(f"{layers}, ")
    assert stages is None or rows["MoE layers"].endswith(f"by pipeline stage {stages}")
    assert rows.get("pairs") == pairs
    if ranks > 1:
        status, report, rows = diagnose(
            *flags, "--hybrid-layer-pattern", pattern, *pipeline, *losses, "--moe-coupling-across-stages", "drop"
        )
        assert rows["pairs"] == f"{pairs} (dropped)"


@needs_training_loop
@pytest.mark.parametrize(
    "flags, message",
    [
        (["--no-such-flag"], "--no-such-flag"),
        (["--tensor-model-parallel-size", 3], "num_attention_heads"),
        (["--coupling-type"], "coupling-type"),
    ],
)
def test_flags_that_megatron_does_not_take(diagnose, flags, message):
    status, report, _ = diagnose(*MODEL, *flags)
    assert status == 2
    assert "Megatron does not take these flags" in report and message in report


def test_missing_training_program_is_named(diagnose, monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron.training", None)
    status, report, _ = diagnose(*MODEL)
    assert status == 1 and "megatron.training cannot be imported" in report
    status, report, rows = diagnose()
    assert status == 0 and rows["megatron.training"].startswith("not found")


def test_missing_megatron_is_named(megatron, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "megatron", None)
    monkeypatch.setitem(sys.modules, "megatron.core", None)
    assert doctor.main([]) == 1
    assert "pip install 'megatron-core" in capsys.readouterr().out


@needs_training_loop
@pytest.mark.slow
@pytest.mark.parametrize(
    "error", ["RuntimeError('Found empty meta package')", "OSError('libcudnn.so.9: no such file')", "ImportError('a')"]
)
def test_a_broken_transformer_engine_is_named(tmp_path, error):
    """Its import fails, and with it Megatron's; flags are judged as where it is missing."""
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text(f"raise {error}\n")
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); from megatron_moe_spec import doctor; sys.exit(doctor.main())"
    )
    report = python("-W", "ignore", "-c", code, tmp_path, *MODEL, *LOSSES)
    assert report.returncode == 0 and report.stdout.endswith("\nusable\n"), report.stdout + report.stderr
    kind, text = error.rstrip("')").split("('")
    assert f"cannot be imported, nor Megatron with it ({kind}: {text})" in report.stdout


def test_any_failure_to_import_megatron_is_named(tmp_path):
    package = tmp_path / "megatron" / "core"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise OSError('libcuda.so.1: no such file')\n")
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); from megatron_moe_spec import doctor; sys.exit(doctor.main())"
    )
    report = python("-W", "ignore", "-c", code, tmp_path)
    assert report.returncode == 1, report.stderr
    assert (
        "megatron-core cannot be imported: OSError: libcuda.so.1" in report.stdout
        and "pip install" not in report.stdout
    )


def test_missing_torch_is_named():
    """Without the site packages."""
    code = "import sys; from megatron_moe_spec import doctor; sys.exit(doctor.main([]))"
    bare = python("-S", "-c", code)
    assert bare.returncode == 1, bare.stderr
    assert "torch                not installed (needed)" in bare.stdout and "No module named 'torch'" in bare.stdout


@pytest.mark.slow
def test_exit_status_of_the_command():
    command = ["-W", "ignore", "-m", "megatron_moe_spec.doctor"]
    helped = python(*command, "--help")
    assert helped.returncode == 0 and "exit status" in helped.stdout
    plain = python(*command)
    assert plain.returncode in (0, 1) and "torch" in plain.stdout
