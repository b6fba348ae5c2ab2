"""
Training with a gate: the head, `EAFTTrainer`, data, what is measured before and while training,
`eaft train`.
"""
