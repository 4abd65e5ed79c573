"""Model addresses, the table of families, loading, and partial runs between layers."""
