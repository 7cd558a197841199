"""Measurements: training steps (`step`), the ops against what else a user would write and against a copy (`op`)."""
