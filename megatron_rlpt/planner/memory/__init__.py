"""Memory of a training rank: weights, optimizer, activations."""
