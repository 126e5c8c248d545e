"""Says what is installed and what the losses would do with a model, without starting it.

python -m megatron_moe_spec.doctor [MEGATRON'S FLAGS ...]
"""

import contextlib
import dataclasses
import importlib.util
import io
import platform
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Optional, Union

if TYPE_CHECKING:
    import torch

    from megatron_moe_spec.config import SpecConfig
    from megatron_moe_spec.integration.support.facts import ModelFacts

USABLE, REFUSED, USAGE = 0, 1, 2

_USAGE = """usage: python -m megatron_moe_spec.doctor [MEGATRON'S FLAGS ...]

Says what is installed and, for the flags of a training run, what the losses would hook and what they would refuse.
Nothing is trained. A GPU and transformer-engine are taken for there where they are missing, so that any machine can
judge the flags of any other. Without coefficients the measured losses are assumed, at their paper's. Run it where the
training script lies, so that a Megatron-LM checkout there is found.

exit status: 0 usable, 1 refused or missing, 2 Megatron itself does not take the flags
"""


def main(argv: Optional[list[str]] = None) -> int:
    """Prints the report for Megatron's flags, by default those of the command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["-h"], ["--help"]):
        print(_USAGE, end="")
        return USABLE
    if not _found("torch"):
        _print_section("installed", [("torch", "not installed (needed)")])
        return _print_verdict(["No module named 'torch': pip install torch"])
    _print_section("installed", _installed(*_prepared()))
    from megatron_moe_spec.integration.compat.release import require_megatron

    try:
        require_megatron()
        verdict = judge(argv) if argv else Verdict()
    except ImportError as error:
        return _print_verdict([str(error)])
    if verdict.megatron_error:
        print(f"\nMegatron does not take these flags: {verdict.megatron_error}")
        return USAGE
    if verdict.used:
        _print_section("would be used", verdict.used)
    if verdict.notices:
        _print_section("notice", enumerate(verdict.notices, 1))
    return _print_verdict(verdict.problems)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the losses would do with the flags of a training run."""

    used: Sequence[tuple[str, str]] = ()  # rows (name, text)
    notices: Sequence[str] = ()  # what is worth knowing
    problems: Sequence[str] = ()  # why they are refused, with the remedies; empty if they are usable
    megatron_error: str = ""  # why Megatron itself rejects them; empty if it does not


def judge(argv: list[str]) -> Verdict:
    """Examines the flags of a run, which may be on another machine.

    Raises:
        ImportError: Megatron's training program is not there, or lacks a package.
    """
    device, _ = _prepared()
    from megatron_moe_spec.integration.compat.assumed import training_machine
    from megatron_moe_spec.integration.compat.training_program import training_modules

    with _silence():
        training_modules()
    with training_machine(has_gpu=device.type == "cuda"):
        try:
            return _judge(argv, device)
        except _Rejected as error:
            return Verdict(megatron_error=str(error))
        except ValueError as error:
            return Verdict(problems=[str(error)])


def _judge(argv: list[str], device: "torch.device") -> Verdict:
    import torch

    from megatron_moe_spec.arguments import spec_config_from_args
    from megatron_moe_spec.integration.compat.assumed import missing_libraries
    from megatron_moe_spec.integration.compat.training_program import moe_layers_of_stages
    from megatron_moe_spec.integration.pipeline.stages import Stages
    from megatron_moe_spec.integration.support.checks import notices, resolve_across_stages, unsupported_settings
    from megatron_moe_spec.integration.support.facts import ModelFacts

    args, transformer_config = _settings(argv)
    given = spec_config_from_args(args, argv)
    assumed = _with_coefficients(given, argv)
    numbers = moe_layers_of_stages(args, transformer_config)
    stages = Stages(numbers, [0], transformer_config.num_moe_experts or 0)
    spec = resolve_across_stages(assumed, stages, transformer_config)
    # Which kernels can run is a question of the other machine.
    known = device if device.type == "cuda" else None
    facts = ModelFacts.of_flags(args, transformer_config, stages, spec, known)
    problems = unsupported_settings(facts)
    if not sum(numbers):
        return Verdict(problems=problems)
    used = list(_used(facts, assumed is not given, device))
    absent = missing_libraries(transformer_config)
    if device.type != "cuda":
        absent.append("a GPU of capability {}.{}".format(*torch.cuda.get_device_capability()))
    if absent:
        used.append(("assumed", f"{', '.join(absent)} (not installed here)"))
    return Verdict(used, notices(facts), problems)


def _with_coefficients(spec: "SpecConfig", argv: list[str]) -> "SpecConfig":
    """Unless the flags set any, with the paper's coefficients of the losses that are measured by default."""
    from megatron_moe_spec.losses import LOSSES
    from megatron_moe_spec.losses.base import config_field, options_of

    options = [(loss, one) for loss in LOSSES for one in options_of(loss) if one.name == "coeff"]
    if spec.enabled or {one.metadata["flag"] for _, one in options} & {flag.partition("=")[0] for flag in argv}:
        return spec
    papers: dict[str, Any] = {
        config_field(one): float(one.metadata["paper"].split(",")[0]) for loss, one in options if loss.measured
    }
    return dataclasses.replace(spec, **papers)


def _print_verdict(problems: Sequence[str]) -> int:
    if problems:
        _print_section("refused", enumerate(problems, 1))
    print(f"\n{'refused' if problems else 'usable'}")
    return REFUSED if problems else USABLE


def _print_section(title: str, rows: Iterable[tuple[Union[str, int], str]]) -> None:
    print(f"\n{title}")
    for name, value in rows:
        print(f"  {name:<20} {value}")


def _installed(device: "torch.device", broken: Optional[str]) -> Iterator[tuple[str, str]]:
    import torch

    gpu = "none seen by torch"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        gpu = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, capability {major}.{minor}"
    yield "GPU", gpu
    yield "python", platform.python_version()
    for package, why_not in (("torch", "needed"), ("triton", "megatron-core needs it on Linux")):
        yield package, _version(package) or f"not installed ({why_not})"
    yield "megatron-core", _megatron()
    yield "megatron.training", "found" if _found("megatron.training") else "not found (needed by the launcher alone)"
    engine = _version("transformer-engine")
    if broken:
        engine = f"{engine or 'installed'}, cannot be imported, nor Megatron with it ({broken})"
    yield "transformer-engine", engine or "not installed (needed by models of --transformer-impl transformer_engine)"
    yield "apex", _version("apex") or "not installed (not needed)"


def _prepared() -> tuple["torch.device", Optional[str]]:
    """Lets Megatron be imported on any machine, before its first import.

    Returns a model's device, and why transformer-engine cannot be imported, if so.
    """
    import torch

    from megatron_moe_spec.integration.compat.assumed import do_without_broken_transformer_engine

    device = torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu").device
    if device.type != "cuda":
        from megatron_moe_spec.cpu import enable

        enable()
    with _silence():
        return device, do_without_broken_transformer_engine()


def _megatron() -> str:
    from megatron_moe_spec.integration.compat.release import megatron_version

    try:
        with _silence():
            return megatron_version().partition("+")[0]
    except Exception as error:  # of any kind, where a library that it imports is broken
        return f"cannot be imported ({type(error).__name__}: {error})"


def _version(package: str) -> Optional[str]:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):  # its package is missing; it is blocked in sys.modules
        return False


class _Rejected(Exception):
    """Megatron itself rejects the flags."""


def _settings(flags: list[str]) -> tuple[Any, Any]:
    from megatron_moe_spec.arguments import add_moe_spec_args
    from megatron_moe_spec.integration.compat.training_program import settings_of_flags
    from megatron_moe_spec.losses.installed import installed_losses

    installed_losses()  # their faults are ours to tell, not Megatron's
    with _silence() as printed:
        try:
            return settings_of_flags(flags, add_moe_spec_args)
        except SystemExit as error:
            raise _Rejected((printed.getvalue().strip().splitlines() or ["it shows its help"])[-1]) from error
        except Exception as error:
            raise _Rejected(f"{type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _silence() -> Iterator[io.StringIO]:
    """Megatron's arguments fill pages, and its parser shows all flags before an error."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(printed):
        yield printed


def _used(facts: "ModelFacts", assumed: bool, device: "torch.device") -> Iterator[tuple[str, str]]:
    from megatron_moe_spec.integration.compat.settings import graphed_modules
    from megatron_moe_spec.integration.support.checks import described_reads

    spec, transformer_config, stages = facts.spec, facts.transformer_config, facts.stages
    trained = [loss for loss in spec.losses if loss.is_trained]
    losses = ", ".join(map(str, trained)) or "none"
    if not trained and spec.metrics_interval:
        losses += ", measuring alone"
    yield "losses", losses + (" (assumed: no coefficient was given)" if assumed else "")
    for loss in trained:
        yield from ((loss.title, text) for text in loss.units(transformer_config))
    if spec.trace_path:
        yield "traces", f"every {spec.trace_interval} iterations to {spec.trace_path}"
    number = f"{sum(stages.num_layers)} of {transformer_config.num_layers}"
    spread = f", by pipeline stage {stages.num_layers}" if len(stages.num_layers) > 1 else ""
    experts = f"{transformer_config.num_moe_experts} experts, {transformer_config.moe_router_topk} for each token"
    yield "MoE layers", f"{number}, {experts}{spread}"
    graphed = "moe_router" in graphed_modules(transformer_config)
    yield "router tap", "MoELayer.preprocess, beside the router's CUDA graph" if graphed else "TopKRouter.routing"
    yield from described_reads(facts)
    yield "kernels", _kernels(spec, device)


def _kernels(spec: "SpecConfig", device: "torch.device") -> str:
    from megatron_moe_spec.kernels import choose, unavailable

    why = unavailable(device)
    if spec.kernels == "torch" or (device.type == "cuda" and not why):
        return "Triton" if choose(spec.kernels, device) else "eager PyTorch"
    if device.type == "cuda":
        return f"eager PyTorch (Triton cannot run: {why})"
    here = "refused" if spec.kernels == "triton" else "eager PyTorch"
    return "Triton on the GPU" + (f"; here {here} (Triton cannot run: {why})" if why else "")


if __name__ == "__main__":
    sys.exit(main())
