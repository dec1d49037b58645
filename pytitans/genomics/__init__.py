"""DNA: classes of sequences, next-base models, embeddings; see docs/genomics.md."""
