"""Statistics, figures and the report of a run folder. Reads manifests and scores, never a model."""
