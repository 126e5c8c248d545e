"""Coupling of MoE layers in different pipeline stages."""
