"""Procedural scenes with exact depth, flow, motion, camera, regions and questions. docs/worlds.md shows them."""
