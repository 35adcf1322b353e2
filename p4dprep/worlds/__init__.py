"""Procedural scenes with exact depth, flow, motion, camera, regions and questions. docs/worlds.md shows them."""

VERSION = "3"
"""Raised whenever the same id would give another scene, picture, truth or question."""
