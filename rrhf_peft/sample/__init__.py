"""Sample candidate responses for prompts: `run` is the story, the policies and decoding strategies its workers."""
