"""Purify availability-poisoned image datasets with sparse diffusion denoisers, on Ray."""
