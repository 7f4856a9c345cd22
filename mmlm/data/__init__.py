"""ShardSet → batches: reader, order, collate."""
