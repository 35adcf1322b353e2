"""Answers: published benchmarks in their own layouts, asked of a student and scored by their own rules."""
