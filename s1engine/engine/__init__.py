"""The paged, continuously batched decoder."""
