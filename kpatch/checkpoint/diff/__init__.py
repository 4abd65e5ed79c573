"""A patch from two checkpoints: which weights differ, and the difference in its smallest form."""
