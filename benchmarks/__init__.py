"""Measurements against limits, each a ratio taken in one run on one machine; never timed tests."""
