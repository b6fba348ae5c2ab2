"""
Adapters for other trainers. Each module imports its host, and nothing in eaft imports the module.
"""
