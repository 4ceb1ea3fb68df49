"""Train an adapter, or all weights, on ranked responses: `run` is the story, `trainer` the step."""
