"""Plain functions over sounds, texts and embeddings, and accumulators over them. No platform in here."""
