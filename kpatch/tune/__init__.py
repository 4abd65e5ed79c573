"""Settings found by trying them: pilot edits, what judges them, and the search that `kpatch tune` runs."""
