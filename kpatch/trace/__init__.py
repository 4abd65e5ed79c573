"""Causal tracing: which states of a model carry a fact, and from that which layers to edit."""
