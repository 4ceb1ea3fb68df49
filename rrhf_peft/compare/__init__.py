"""Several objectives on the same data, in one table: `run` is the whole story."""
