"""What a training step leaves behind: its clock, the values of its losses, its measures, its traces."""
