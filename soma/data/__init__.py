"""Raw text to corpus to token shards: sources, cleaning, deduplication, tokenizer training, packing. Loads no torch."""
