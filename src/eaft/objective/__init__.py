"""
The loss and what it is made of: token statistics, gates, the reference loss and the fused one.
"""

from eaft.objective import gates as gates  # registers the formulas
