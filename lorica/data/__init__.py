"""From raw rows to batches.

    sources     a file, a folder or a hub id -> Examples; every bad row with its place
      readers   files of each kind -> raw rows
      formats   a raw row of a known format -> Example
      turns     the turns of a conversation, as the world writes them -> Messages
      rows      Example, Message, and what is said of a row that cannot become one
    render      Example -> TokenizedExample, many -> TokenizedDataset
      template  which chat template; a conversation rendered with it
      sandbox   jinja that always ends
      limits    what a template may make
      spans     which characters of the rendered conversation the model has to say
      tokenized samples as flat arrays
    sampler     the order of the samples, a function of seed and epoch
    packing     samples -> Batch, packed without padding or padded
    components  which kinds of rows the data consists of
      features  texts -> hashed counts of words and character n-grams
      clustering  groups of rows, and how many there are
    check       what the data holds, before anything is trained on it

Nothing is imported here, so that reading rows does not wait for torch.
"""
