"""Devices, run folders, checkpoints and inference: what every job needs from the machine."""
