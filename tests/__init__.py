"""Tests of p4dprep."""
