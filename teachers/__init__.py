"""Frozen experts, one file each; each implements `p4dprep.targets.Teacher` and nothing else."""
