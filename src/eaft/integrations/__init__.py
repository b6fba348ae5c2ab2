"""What other trainers load by name: each module imports its host only when the host imports it."""
