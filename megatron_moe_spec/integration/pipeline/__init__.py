"""Losses of MoE layers in different pipeline stages."""
