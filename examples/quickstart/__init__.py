"""Train a tiny model without and with the losses: ``python -m examples.quickstart``."""
