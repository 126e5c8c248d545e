"""Says what is installed and what the losses would do with a model, without starting it.

    python -m megatron_moe_spec.doctor [MEGATRON'S FLAGS ...]
"""

import contextlib
import importlib.util
import io
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Iterator, Optional

from megatron_moe_spec.arguments import add_moe_spec_args, spec_config_from_args
from megatron_moe_spec.config import SpecConfig

USABLE, REFUSED, USAGE = 0, 1, 2

_USAGE = """usage: python -m megatron_moe_spec.doctor [MEGATRON'S FLAGS ...]

Says what is installed and, for the flags of a training run, what the losses would hook and what they would refuse.
Nothing is trained and no GPU is needed. Without flags of this package both losses are assumed, at the paper's
coefficients. Run it where the training script lies, so that a Megatron-LM checkout there is found.

exit status: 0 usable, 1 refused or missing, 2 Megatron itself does not take the flags
"""
_PAPER = SpecConfig(specialization_loss_coeff=2e-3, coupling_loss_coeff=1e-3)


def main(argv: list[str]) -> int:
    """Prints the report for Megatron's flags; returns the exit status."""
    if argv[:1] in (["-h"], ["--help"]):
        print(_USAGE, end="")
        return USABLE
    device = _device()
    _print_section("installed", _installed())
    missing = _missing(wants_training=bool(argv))
    if missing:
        return _verdict([missing])
    if not argv:
        return _verdict([])
    try:
        args, model = _settings(argv)
    except _NotTaken as error:
        print(f"\nMegatron does not take these flags: {error}")
        return USAGE
    try:
        asked = spec_config_from_args(args, argv)
    except ValueError as error:
        return _verdict([str(error)])
    return _verdict(_examine(args, model, asked, device))


def _examine(args, model, asked: SpecConfig, device) -> list[str]:
    """Prints what would be used; returns what would be refused."""
    from megatron_moe_spec.integration.checks import unsupported_settings
    from megatron_moe_spec.integration.compat import moe_layers_of_stages
    from megatron_moe_spec.integration.pipeline import Stages

    config = asked if asked.enabled else _PAPER
    numbers = moe_layers_of_stages(args, model)
    stages = Stages(numbers, [0], model.num_moe_experts or 0)
    problems = unsupported_settings(model, stages, config, device)
    if sum(numbers):
        _print_section("would be used", _used(model, stages, config, asked.enabled, device))
    return problems


def _verdict(problems: list[str]) -> int:
    if problems:
        _print_section("refused", ((str(number), problem) for number, problem in enumerate(problems, 1)))
    print(f"\n{'refused' if problems else 'usable'}")
    return REFUSED if problems else USABLE


def _print_section(title: str, rows) -> None:
    print(f"\n{title}")
    for name, value in rows:
        print(f"  {name:<20} {value}")


def _installed() -> Iterator[tuple[str, str]]:
    if not _found("torch"):
        yield "torch", "not installed (needed)"
        return
    yield "GPU", _gpu()
    _do_without_gpu()
    yield "python", platform.python_version()
    for package, why_not in (("torch", "needed"), ("triton", "megatron-core needs it on Linux")):
        yield package, _version(package) or f"not installed ({why_not})"
    yield "megatron-core", _megatron()
    yield "megatron.training", "found" if _found("megatron.training") else "not found (needed by the launcher alone)"
    for package, why_not in (
        ("transformer-engine", "not needed; Megatron's own layers are used"),
        ("apex", "not needed"),
    ):
        yield package, _version(package) or f"not installed ({why_not})"


def _device():
    """Where a model would be; None without torch."""
    if not _found("torch"):
        return None
    import torch

    return torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu").device


def _do_without_gpu() -> None:
    """Lets Megatron be imported and asked without a GPU; before its first import."""
    import torch

    if not torch.cuda.is_available():
        from megatron_moe_spec.cpu import enable

        enable()


def _megatron() -> str:
    from megatron_moe_spec.integration.compat import megatron_version

    try:
        with _silence():
            return megatron_version().partition("+")[0]
    except ImportError as error:
        return f"cannot be imported ({error})"


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


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none seen by torch"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, capability {major}.{minor}"


def _missing(wants_training: bool) -> Optional[str]:
    """What has to be installed first."""
    try:
        from megatron_moe_spec.integration.compat import require_megatron, training_modules

        require_megatron()
        if wants_training:
            with _silence():
                training_modules()
    except ImportError as error:
        return str(error)
    return None


class _NotTaken(Exception):
    """Megatron's own objection to the flags."""


def _settings(flags: list[str]):
    from megatron_moe_spec.integration.compat import settings_of_flags

    with _silence() as printed:
        try:
            return settings_of_flags(flags, add_moe_spec_args)
        except SystemExit as error:
            raise _NotTaken((printed.getvalue().strip().splitlines() or ["it shows its help"])[-1]) from error
        except Exception as error:
            raise _NotTaken(f"{type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _silence():
    """Megatron's arguments fill pages, and its parser shows all flags before an error."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(printed):
        yield printed


def _used(model, stages, config: SpecConfig, asked: bool, device) -> Iterator[tuple[str, str]]:
    losses = [
        f"{name.removesuffix('_loss')} x {getattr(config, f'{name}_coeff'):g}" for name in config.trained_losses
    ] or ["none, measuring alone"]
    yield "losses", ", ".join(losses) + ("" if asked else " (assumed: no flag of this package was given)")
    if config.coupling_loss_coeff:
        yield "coupling", config.coupling_type
    number = f"{sum(stages.num_layers)} of {model.num_layers}"
    spread = f", by pipeline stage {stages.num_layers}" if len(stages.num_layers) > 1 else ""
    yield "MoE layers", f"{number}, {model.num_moe_experts} experts, {model.moe_router_topk} for each token{spread}"
    yield "router tap", "TopKRouter.routing"
    if config.specialization_loss_coeff or config.metrics_interval:
        yield "activation tap", _activation_tap(model)
        yield "dispatcher", _dispatcher(model)
    yield "kernels", _kernels(config, device)


def _kernels(config: SpecConfig, device) -> str:
    from megatron_moe_spec.kernels import choose, unavailable

    if config.kernels != "torch" and not unavailable(device):
        return "Triton" if choose(config.kernels, device) else "eager PyTorch"
    why = "" if config.kernels == "torch" else f" (Triton cannot run: {unavailable(device)})"
    return f"eager PyTorch{why}"


def _activation_tap(model) -> str:
    grouped = model.moe_grouped_gemm and model.transformer_impl != "local"
    if grouped and _version("transformer-engine"):
        return "input of linear_fc2 of all local experts (TEGroupedMLP)"
    why = " for want of transformer-engine" if grouped else ""
    return f"input of each local expert's linear_fc2 (SequentialMLP{why})"


def _dispatcher(model) -> str:
    ranks = model.expert_model_parallel_size
    where = f"rows come home from {ranks} expert-parallel ranks" if ranks > 1 else "every rank has all experts"
    columns = model.expert_tensor_parallel_size or model.tensor_model_parallel_size
    summed = f"; products are summed over {columns} expert-tensor-parallel ranks" if columns > 1 else ""
    return f"{model.moe_token_dispatcher_type}; {where}{summed}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
