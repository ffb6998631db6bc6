"""Stores, buffers and datasets, by the names that agentlace has for them."""
