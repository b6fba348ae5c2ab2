"""The loss and what it is made of: token statistics, gates, the reference loss and the fused one."""
