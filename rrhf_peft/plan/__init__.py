"""Recipe in, predicted peak memory out: arithmetic on shapes, no weights loaded, no GPU needed."""
