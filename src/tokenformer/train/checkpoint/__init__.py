"""Training checkpoints: complete or invisible, checksummed, readable on any number of processes."""
