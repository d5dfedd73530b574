"""One run on disk: data, checkpoints, logs, provenance."""
