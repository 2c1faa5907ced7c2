"""Base models: loading them, our attention function, and the loss that never makes [tokens, vocabulary] logits."""
