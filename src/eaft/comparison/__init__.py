"""Several objectives from one base model: `eaft compare`."""
