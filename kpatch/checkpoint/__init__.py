"""Patches on checkpoint directories: plan, stage, commit, take back. Bytes only; the model is never loaded."""
