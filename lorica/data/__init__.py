"""From raw rows to batches.

    sources   a file, a folder or a hub id -> Example (messages or text), every bad row with its line
    formats   one row of a known format -> Example
    template  a chat template rendered in a sandbox that cannot run for ever
    spans     which characters of the rendered conversation the model has to say
    render    Example -> TokenizedExample (input_ids, labels), many -> TokenizedDataset
    sampler   the order of the samples, a function of seed and epoch
    packing   samples -> Batch, one row without padding or padded
    check     what the data holds, before anything is trained on it

Nothing is imported here, so that reading rows does not wait for torch.
"""
