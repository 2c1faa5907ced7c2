"""Quantised weights: the codebooks, and tensors in blocks of a few bits with their scales."""
