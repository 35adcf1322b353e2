"""The engine of p4dprep: corpora, video, targets, caches and extraction. It knows no model and no screen."""

__version__ = "0.1.0"
