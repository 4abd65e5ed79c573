"""Records of published data sets as facts."""
