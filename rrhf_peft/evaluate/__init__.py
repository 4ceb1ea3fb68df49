"""Compare policies on held-out prompts: `run` is the story, the measures its workers."""
