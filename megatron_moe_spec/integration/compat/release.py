"""Releases of Megatron-Core: which are supported."""

import re

import torch

OLDEST_SUPPORTED = (0, 16, 1)


def require_megatron() -> None:
    """Raises ImportError where megatron-core is missing or too old, naming the remedy."""
    oldest = ".".join(map(str, OLDEST_SUPPORTED))
    try:
        version = megatron_version()
    except ImportError as error:
        raise ImportError(
            f"megatron-core is needed to attach the losses: pip install 'megatron-core>={oldest}'"
        ) from error
    if _release(version) < OLDEST_SUPPORTED:
        raise ImportError(f"megatron-core {version} is too old: {oldest} or newer is needed")


def megatron_version() -> str:
    """Version of the Megatron-Core that is imported: an installed one, or that of a checkout around the script."""
    from megatron.core import __version__ as version

    return version


def _release(version: str) -> tuple[int, ...]:
    """(0, 16, 1) of "0.16.1", "0.16.1rc0" and "0.16.1+local"."""
    return tuple(int(re.match(r"\d*", part)[0] or 0) for part in version.split(".")[:3])


def current_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
