"""
Data through a model: tokens, their statistics, and the model's own answers, written as tables.
"""
