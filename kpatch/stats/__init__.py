"""Second moments of keys over text: sampling, collecting, caching."""
