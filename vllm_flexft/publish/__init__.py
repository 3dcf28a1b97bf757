"""Adapters and checkpoints on disk, written so that no reader ever sees half of one."""
