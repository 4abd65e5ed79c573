"""Trained editors: a network that turns a fact's gradient into an update, its file, and its training."""
