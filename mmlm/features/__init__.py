"""one record → arrays, pure and cluster-free: text, image, audio, fields; tokenizer training."""
