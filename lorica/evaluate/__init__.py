"""Measuring a model: the likelihood of held-out text, and the text it generates against references.

    likelihood     mean token loss, perplexity, bits a byte
    generation     batched and streamed generation with a KV cache
    text_metrics   exact match, BLEU, ROUGE-L, chrF

Nothing is imported here, so that scoring texts does not wait for torch.
"""
