"""Neural networks on plain tensors; parameter names are those of the published checkpoints."""
