"""The embedded world: scenes with roads, traffic, a human driver and cameras, made from a seed. No download."""
