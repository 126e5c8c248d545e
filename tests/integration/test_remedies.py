"""A remedy, applied to the flags that were refused, makes them usable: it names all flags that have to change."""

import re
from types import SimpleNamespace

import pytest
from processes import needs_training_loop
from rule_texts import message_of
from test_doctor import FSDP, RECIPE, diagnose  # noqa: F401

SPECIALIZATION = ["--moe-specialization-loss-coeff", 1e-3]
ERC = ["--moe-erc-loss-coeff", 1]
ORTHOGONALITY = ["--moe-orthogonality-loss-coeff", 1e-4]
ROUTER = ["--moe-router-orthogonality-loss-coeff", 1e-2]
COUPLING = ["--moe-coupling-loss-coeff", 1e-3]
PIPELINE = ["--num-layers", 8, "--pipeline-model-parallel-size", 2, "--num-layers-per-virtual-pipeline-stage", 2]
OVERLAP = ["--overlap-moe-expert-parallel-comm", "--delay-wgrad-compute"]
SINGLES = ["--num-layers", 2, "--pipeline-model-parallel-size", 2]
FUSED = ["--use-transformer-engine-op-fuser"]
TOP_1 = ["--moe-router-topk", 1, "--moe-router-pre-softmax"]
PATTERN = ["--hybrid-layer-pattern", "*-*-/*E"]
DENSE = ["no --num-experts", "no --expert-model-parallel-size", "no --moe-grouped-gemm", "no --moe-ffn-hidden-size"]
OFF = {"--moe-spec-metrics-interval": 0}
WITHOUT_OVERLAP = {flag: None for flag in OVERLAP}

FP8 = ["--fp8-format", "e4m3", "--fp8-recipe", "mxfp8", "--fp8-param-gather", "--use-distributed-optimizer"]
FP8 += ["--reuse-grad-buf-for-mxfp8-param-ag", "--moe-router-padding-for-quantization"]
GRAPHS = ["--cuda-graph-impl", "transformer_engine"]
FLEX = ["--moe-token-dispatcher-type", "flex"]
HYBRIDEP = [*FLEX, "--moe-flex-dispatcher-backend", "hybridep"]
TENSOR = ["--tensor-model-parallel-size", 2, "--sequence-parallel"]
PREPROCESS = [*GRAPHS, "--cuda-graph-scope", "moe_router", "moe_preprocess"]
ROUTERS_GRAPHED = {"--cuda-graph-scope": ("attn", "moe_router")}
EXACT = ["--moe-coupling-across-stages", "exact"]
MTP_ALONE = ["--mtp-num-layers", 1, "--pipeline-model-parallel-size", 4]
MTP_ALONE += ["--pipeline-model-parallel-layout", "Ett|tt|m|L"]

ONE_IN_EACH_STAGE = "--moe-coupling-across-stages drop with one MoE layer in each stage"
OP_FUSER = "--use-transformer-engine-op-fuser"

CASES = [
    # What the arithmetic of a loss needs.
    ("", ERC + ["--moe-latent-size", 256], {"--moe-latent-size": None}),
    ("", ERC + ["no --swiglu"], {"--swiglu": ()}),
    ("", ERC + ["no --swiglu"], {"--moe-erc-loss-coeff": 0}),
    ("", SPECIALIZATION + TOP_1, {"--moe-router-topk": 2}),
    ("", ORTHOGONALITY + TOP_1, {"--moe-orthogonality-loss-coeff": 0}),
    # Rules.
    ("FSDP", ERC + FSDP, {"--moe-erc-loss-coeff": 0}),
    (
        "--expert-tensor-parallel-num-weight-shards",
        ERC + ["--expert-tensor-parallel-num-weight-shards", 2],
        {"--expert-tensor-parallel-num-weight-shards": None},
    ),
    (
        "--fp8-param-gather, --fp4-param-gather",
        ERC + FP8,
        {"--fp8-param-gather": None, "--reuse-grad-buf-for-mxfp8-param-ag": None},
    ),
    ("FSDP", ROUTER + FSDP, {"--moe-router-orthogonality-loss-coeff": 0}),
    ("--overlap-moe-expert-parallel-comm", ERC + OVERLAP, WITHOUT_OVERLAP),
    ("--overlap-moe-expert-parallel-comm", ERC + OVERLAP, {"--moe-erc-loss-coeff": 0}),
    (
        "delayed weight gradients",
        ERC + ["--overlap-dispatch-backward-with-experts-wgrad"],
        {"--overlap-dispatch-backward-with-experts-wgrad": None},
    ),
    (
        "one weight for all experts",
        ERC + FUSED + ["--moe-single-grouped-weight"],
        {"--moe-single-grouped-weight": None},
    ),
    ("one MoE layer", COUPLING + ["--num-layers", 1], {"--moe-coupling-loss-coeff": 0}),
    (
        ONE_IN_EACH_STAGE,
        COUPLING + SINGLES + ["--moe-coupling-across-stages", "drop"],
        {"--moe-coupling-across-stages": "exact"},
    ),
    (
        "--moe-coupling-across-stages exact with --overlap-moe-expert-parallel-comm",
        COUPLING + PIPELINE + OVERLAP + EXACT,
        {"--moe-coupling-across-stages": "auto"},
    ),
    (
        "--moe-coupling-across-stages exact with --overlap-moe-expert-parallel-comm",
        COUPLING + PIPELINE + OVERLAP + EXACT,
        {"--moe-coupling-across-stages": "drop"},
    ),
    (
        "--moe-coupling-across-stages exact with --overlap-moe-expert-parallel-comm",
        COUPLING + PIPELINE + OVERLAP + EXACT,
        WITHOUT_OVERLAP,
    ),
    (
        "--moe-coupling-across-stages exact with stages of MTP layers alone",
        COUPLING + MTP_ALONE + EXACT,
        {"--moe-coupling-across-stages": "auto"},
    ),
    (
        "--moe-coupling-across-stages exact with stages of MTP layers alone",
        COUPLING + MTP_ALONE + EXACT,
        {"--pipeline-model-parallel-layout": "Ett|t|t|mL"},
    ),
    (ONE_IN_EACH_STAGE, COUPLING + PIPELINE[:-1] + [1, "--num-layers", 4, *OVERLAP], WITHOUT_OVERLAP),
    (
        ONE_IN_EACH_STAGE,
        COUPLING + PIPELINE[:-1] + [1, "--num-layers", 4, *OVERLAP],
        {"--moe-coupling-loss-coeff": 0},
    ),
    (
        "--moe-router-dtype fp64 with --moe-spec-kernels triton",
        COUPLING + ["--moe-router-dtype", "fp64", "--moe-spec-kernels", "triton"],
        {"--moe-router-dtype": "fp32"},
    ),
    (OP_FUSER, SPECIALIZATION + FUSED, {"--use-transformer-engine-op-fuser": None}),
    (OP_FUSER, SPECIALIZATION + FUSED, {"--moe-specialization-loss-coeff": 0, **OFF}),
    (OP_FUSER, COUPLING + FUSED + ["--moe-spec-metrics-interval", 10], {"--moe-specialization-loss-coeff": 0, **OFF}),
    (
        OP_FUSER,
        SPECIALIZATION + FUSED + ["--moe-single-grouped-weight"],
        {"--use-transformer-engine-op-fuser": None, "--moe-single-grouped-weight": None},
    ),
    (
        "more expert-tensor-parallel than tensor-parallel ranks",
        SPECIALIZATION + ["--tensor-model-parallel-size", 1, "--expert-tensor-parallel-size", 2],
        {"--expert-tensor-parallel-size": None},
    ),
    (
        "more expert-tensor-parallel than tensor-parallel ranks",
        SPECIALIZATION + ["--tensor-model-parallel-size", 1, "--expert-tensor-parallel-size", 2],
        {"--expert-tensor-parallel-size": 1},
    ),
    (
        "expert tensor parallelism",
        ORTHOGONALITY + TENSOR + ["--expert-tensor-parallel-size", 2],
        {"--expert-tensor-parallel-size": 1},
    ),
    (
        "expert tensor parallelism with --moe-token-dispatcher-type flex",
        ORTHOGONALITY + TENSOR + HYBRIDEP,
        {"--expert-tensor-parallel-size": 1},
    ),
    (
        "--moe-flex-dispatcher-backend ncclep",
        SPECIALIZATION + FLEX + ["--moe-flex-dispatcher-backend", "ncclep"],
        {"--moe-flex-dispatcher-backend": "deepep"},
    ),
    (
        "--moe-expert-rank-capacity-factor",
        SPECIALIZATION + FUSED + HYBRIDEP + ["--moe-expert-rank-capacity-factor", 1.5],
        {"--use-transformer-engine-op-fuser": None, "--moe-expert-rank-capacity-factor": None},
    ),
    ("CUDA graphs over layers, experts or steps", SPECIALIZATION + GRAPHS, ROUTERS_GRAPHED),
    (
        "CUDA graphs over layers, experts or steps",
        SPECIALIZATION + ["--cuda-graph-impl", "local"],
        {"--cuda-graph-impl": "transformer_engine", **ROUTERS_GRAPHED},
    ),
    (
        "CUDA graphs over moe_router with --moe-input-jitter-eps",
        COUPLING + [*GRAPHS, "--cuda-graph-scope", "moe_router", "--moe-input-jitter-eps", 0.1],
        {"--moe-input-jitter-eps": None},
    ),
    (
        "CUDA graphs over moe_router with --moe-input-jitter-eps",
        COUPLING + [*GRAPHS, "--cuda-graph-scope", "moe_router", "--moe-input-jitter-eps", 0.1],
        {"--cuda-graph-scope": "attn"},
    ),
    (
        "CUDA graphs over moe_preprocess with --moe-latent-size",
        SPECIALIZATION + PREPROCESS + ["--moe-latent-size", 256],
        ROUTERS_GRAPHED,
    ),
    (
        "CUDA graphs over moe_preprocess with --moe-expert-capacity-factor",
        SPECIALIZATION + PREPROCESS + ["--moe-expert-capacity-factor", 1.0, "--moe-pad-expert-input-to-capacity"],
        ROUTERS_GRAPHED,
    ),
    (
        "CUDA graphs over moe_preprocess with --moe-router-padding-for-quantization",
        SPECIALIZATION + PREPROCESS + FP8[:4] + FP8[-1:],
        ROUTERS_GRAPHED,
    ),
    (
        "CUDA graphs over moe_preprocess with --expert-tensor-parallel-size",
        COUPLING + PREPROCESS + TENSOR + HYBRIDEP,
        ROUTERS_GRAPHED,
    ),
    (
        "--hybrid-context-parallel",
        COUPLING + ["--hybrid-context-parallel", "--calculate-per-token-loss"],
        {"--hybrid-context-parallel": None},
    ),
    (
        "inference layers",
        COUPLING + ["no --swiglu", "--transformer-impl", "inference_optimized", "--moe-router-dtype", "fp32"],
        {"--transformer-impl": "transformer_engine"},
    ),
    ("no MoE layer", DENSE, {"--num-experts": 8}),
    (
        "--moe-layer-freq without 1",
        [*SPECIALIZATION, "--moe-layer-freq", "[0,0,0,0]"],
        {"--moe-layer-freq": "[0,1,0,1]"},
    ),
    ("no E in the layer pattern", SPECIALIZATION + PATTERN, {"--hybrid-layer-pattern": "*E*-/*E"}),
    ("no E in the layer pattern", ["--hybrid-override-pattern", "*-*-"], {"--hybrid-override-pattern": "*E*E"}),
    (
        "no E in the layer pattern",
        SPECIALIZATION + PATTERN + DENSE,
        {"--hybrid-layer-pattern": "*E*-", "--num-experts": 8},
    ),
]


def _changed(flags: list[str], changes: dict) -> list[str]:
    """Flags with others' values; None: without the flag, a tuple: with all of its values."""
    changed: list[str] = []
    skips = False
    for word in flags:
        skips = skips and not word.startswith("--")
        if word in changes:
            skips = True
        if not skips:
            changed.append(word)
    for flag, value in changes.items():
        if value is not None:
            changed += [flag, *map(str, value)] if isinstance(value, tuple) else [flag, str(value)]
    return changed


def _skip_if_older_megatron_objects(status: int) -> None:
    from megatron_moe_spec.integration.compat.release import megatron_version

    if status == 2 and megatron_version().startswith(("0.16", "0.17", "0.18")):
        pytest.skip("this Megatron has other flags")


@needs_training_loop
@pytest.mark.parametrize("rule, flags, remedy", CASES)
def test_remedy_makes_the_flags_usable(diagnose, rule, flags, remedy):  # noqa: F811
    flags = [str(word) for word in flags]
    left = {word.removeprefix("no "): None for word in flags if word.startswith("no ")}
    refused = _changed(RECIPE, left) + [word for word in flags if not word.startswith("no ")]
    status, report, _ = diagnose(*refused)
    _skip_if_older_megatron_objects(status)
    assert status == 1, report
    said = report[report.rindex("refused\n  1") :]
    assert not rule or re.search(message_of(rule), said), said
    for flag in remedy:
        assert re.search(rf"{flag}\b", said), said
    status, report, _ = diagnose(*_changed(refused, remedy))
    assert status == 0, report


@needs_training_loop
@pytest.mark.parametrize("backend", [[], ["--moe-enable-deepep"], HYBRIDEP[2:], [*HYBRIDEP[2:3], "ncclep"]])
def test_remedy_of_a_dispatcher_whose_rows_lie_otherwise(diagnose, monkeypatch, backend):  # noqa: F811
    """It is only found while training."""
    from megatron_moe_spec import doctor
    from megatron_moe_spec.integration.support.remedies import with_alltoall

    texts = []

    def settings(argv):
        args, transformer_config = examine(argv)
        texts.append(with_alltoall(SimpleNamespace(transformer_config=transformer_config)))
        return args, transformer_config

    examine = doctor._settings
    monkeypatch.setattr(doctor, "_settings", settings)
    status, report, _ = diagnose(*RECIPE, *FLEX, *backend)
    _skip_if_older_megatron_objects(status)
    assert status != 2, report
    named = {flag: None for flag in re.findall(r"--[a-z0-9-]+", texts[0])}
    status, report, _ = diagnose(*_changed([*RECIPE, *FLEX, *backend], {**named, FLEX[0]: "alltoall"}))
    assert status == 0, report
