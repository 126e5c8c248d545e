"""Train a model with each of several specialization losses: ``python -m examples.compare``."""
