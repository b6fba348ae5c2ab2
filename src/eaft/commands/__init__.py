"""
The commands: flags, help and the call, one module each. torch is imported after the arguments are
parsed.
"""
