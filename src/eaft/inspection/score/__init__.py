"""Scores data with models, and writes the tokens, their statistics and the examples as tables."""
