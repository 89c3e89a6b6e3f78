"""Drills: what a run must survive, done to real runs. ``python -m drills --help``."""
