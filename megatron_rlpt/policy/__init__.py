"""The policy: a Megatron-Core model with its optimizer, log-probabilities, reference and weight export."""
