"""The patch file: low-rank deltas, the manifest, reading and writing."""
