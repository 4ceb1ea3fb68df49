"""Prompts into candidates into scored groups, through files: what joins data and models with sampling and scoring."""
