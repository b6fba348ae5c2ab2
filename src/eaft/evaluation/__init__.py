"""
What a model gained and what it forgot: suites of tasks, drift, paired statistics, `eaft eval`.
"""
