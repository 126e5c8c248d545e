"""Coupling of MoE layers in different pipeline stages.

stages          the MoE layers of each stage
message_format  what a message holds for each token
stage_messages  sends and receives the messages of one model chunk
cross_stage     the messages of all chunks of a rank, in Megatron's schedules
"""
