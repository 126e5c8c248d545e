from processes import HAS_TRANSFORMER_ENGINE

# In its own environment, which make test-te makes, and nowhere else.
if not HAS_TRANSFORMER_ENGINE:
    collect_ignore_glob = ["test_*.py"]
