"""From facts to weight changes: values, keys, the solve, and the loop over layers."""
