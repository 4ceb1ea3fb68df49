"""Rounds: sample from the current policy, score, train, evaluate, and again from what was trained (IP-n).

    round-1/candidates.jsonl -> round-1/scored.jsonl -> round-1/run/ -> round-1/evaluation/
                                                            |
    round-2/candidates.jsonl <------------------------------+

The loop is closed through files: each stage is one of the other verbs, run with a recipe that `stages` derives.
"""
