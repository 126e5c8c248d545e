import pytest
from processes import HAS_TRANSFORMER_ENGINE

# In its own environment, which make test-te makes, and nowhere else.
if not HAS_TRANSFORMER_ENGINE:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def calls(megatron):
    """How often each function of the extension is called in a test."""
    from transformer_engine_torch import calls

    calls.clear()
    return calls
