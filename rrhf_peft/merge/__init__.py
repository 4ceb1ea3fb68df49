"""Adapter in, standalone weights out, with the proof that they compute the same: `run` is the story."""
