"""Score candidate responses, higher is better: `run` is the story, each scorer a file beside it."""
