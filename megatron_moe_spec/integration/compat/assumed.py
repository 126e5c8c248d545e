"""What is taken for installed while flags are examined on another machine than the one that trains.

Megatron refuses flags for want of transformer-engine where it is missing, and asks what the GPU is. Nothing here
computes anything: of functions that are only there with transformer-engine, validation asks whether they are there.
"""

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import Any, NoReturn, Optional
from unittest import mock

from megatron_moe_spec.integration.compat.protocols import TransformerConfig

_TRANSFORMER_ENGINE = "transformer_engine"
_assumed: set[str] = set()


def has_transformer_engine() -> bool:
    """Whether Megatron builds its layers from transformer-engine here, or would on the machine that is assumed."""
    return _TRANSFORMER_ENGINE in _assumed or _is_installed(_TRANSFORMER_ENGINE)


def do_without_broken_transformer_engine() -> Optional[str]:
    """Where transformer-engine is installed and cannot be imported, has it taken for missing; says why it cannot be.

    Its errors, such as the RuntimeError of its package without libraries, are not all ImportError, the one after which
    Megatron does without it. To be called before Megatron is imported.
    """
    if not _is_installed(_TRANSFORMER_ENGINE):
        return None
    try:
        importlib.import_module(f"{_TRANSFORMER_ENGINE}.pytorch")
    except Exception as error:
        sys.modules[_TRANSFORMER_ENGINE] = None  # type: ignore[assignment]  # which makes importing it an ImportError
        return f"{type(error).__name__}: {error}"
    return None


@contextlib.contextmanager
def training_machine(has_gpu: bool) -> Iterator[None]:
    """Takes transformer-engine for installed, for the time of the ``with`` block.

    Import Megatron before: names are replaced in the modules that are there. The environment is that of the other
    machine, too: without a GPU, what is set for one here says nothing.
    """
    with mock.patch.dict(os.environ):
        if not has_gpu:
            os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)
        with contextlib.nullcontext() if _is_installed(_TRANSFORMER_ENGINE) else _assumed_transformer_engine():
            yield


@contextlib.contextmanager
def _assumed_transformer_engine() -> Iterator[None]:
    from megatron.core.transformer.moe import moe_utils

    fused = "permute", "permute_with_probs", "sort_chunks_by_index", "sort_chunks_by_index_with_probs", "unpermute"
    # Without transformer-engine, 0.16 does not define them.
    absent = [f"fused_{name}" for name in fused if not hasattr(moe_utils, f"fused_{name}")]
    original = sys.modules["megatron.core.utils"].is_te_min_version
    _assumed.add(_TRANSFORMER_ENGINE)
    for name in absent:
        setattr(moe_utils, name, None)
    _replace("is_te_min_version", original, _always)
    _replace("fused_", None, _never_called)
    try:
        yield
    finally:  # also in modules that were imported meanwhile
        _replace("fused_", _never_called, None)
        for name in absent:
            delattr(moe_utils, name)
        _replace("is_te_min_version", _always, original)
        _assumed.discard(_TRANSFORMER_ENGINE)


def missing_libraries(transformer_config: TransformerConfig) -> list[str]:
    """Libraries that a model will want and that are not installed here."""
    wanted = {
        _TRANSFORMER_ENGINE: transformer_config.transformer_impl != "local",
        "apex": transformer_config.gradient_accumulation_fusion,
        "deep_ep": transformer_config.moe_token_dispatcher_type == "flex",
    }
    return [module.replace("_", "-") for module, is_wanted in wanted.items() if is_wanted and not _is_installed(module)]


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):  # it is blocked, or a stand-in
        return False


def _replace(prefix: str, old: Any, new: Any) -> None:
    """In every module of Megatron, a name that begins so and means ``old``."""
    for module_name, module in list(sys.modules.items()):
        if module is not None and module_name.split(".")[0] == "megatron":
            for name, value in list(vars(module).items()):
                if name.startswith(prefix) and value is old:
                    setattr(module, name, new)


def _always(*args: Any, **kwargs: Any) -> bool:
    return True


def _never_called(*args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError("flags are examined here, and nothing is computed")
