"""
Data seen through a model: scored once and kept, what is found in it, and a page to look around.
"""
