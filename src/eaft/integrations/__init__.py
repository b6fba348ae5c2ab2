"""
Doors that other trainers have: a module each, that imports its host and is imported by nothing
here.
"""
