"""Scoring preferences: surface forms, question sets, and the evaluator. See `evaluate`."""
