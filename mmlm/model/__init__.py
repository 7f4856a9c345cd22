"""tensors only: attention, embeddings per modality, the fused Transformer, heads, generation."""
