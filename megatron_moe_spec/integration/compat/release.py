"""Releases of Megatron-Core: which are supported."""

import re

OLDEST_SUPPORTED = (0, 16, 1)


def require_megatron() -> None:
    """Raises ImportError where megatron-core is missing, broken or too old, naming the remedy."""
    oldest = ".".join(map(str, OLDEST_SUPPORTED))
    try:
        version = megatron_version()
    except Exception as error:  # of any kind, where a library that it imports is broken
        if isinstance(error, ModuleNotFoundError) and error.name in ("megatron", "megatron.core"):
            raise ImportError(
                f"megatron-core is needed to attach the losses: pip install 'megatron-core>={oldest}'"
            ) from error
        raise ImportError(
            f"megatron-core cannot be imported: {type(error).__name__}: {error} (mend what it imports, until "
            "python -c 'import megatron.core' succeeds)"
        ) from error
    # Also of "0.16.1rc0" and "0.16.1+local".
    if tuple(int("0" + re.sub(r"\D.*", "", part)) for part in version.split(".")[:3]) < OLDEST_SUPPORTED:
        raise ImportError(f"megatron-core {version} is too old: {oldest} or newer is needed")


def megatron_version() -> str:
    """Version of the Megatron-Core that is imported: an installed one, or that of a checkout around the script."""
    from megatron.core import __version__ as version

    return version
