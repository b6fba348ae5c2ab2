"""The gated loss inside other trainers, each module importing its host only when used."""
