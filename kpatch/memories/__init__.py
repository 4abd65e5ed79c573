"""Feed-forward layers as key-value memories: what triggers each unit, and what its value promotes."""
