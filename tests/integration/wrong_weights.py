"""Faults in a stream of weights: each function returns the changed weights and the name to report."""

import torch


def missing(weights):
    return weights[:4] + weights[5:], weights[4][0]


def extra(weights):
    return [*weights[:4], ("model.surplus.weight", torch.zeros(2)), *weights[4:]], "model.surplus.weight"


def duplicate(weights):
    return [*weights[:4], weights[2], *weights[4:]], weights[2][0]


def wrong_shape(weights):
    name, tensor = weights[4]
    return [*weights[:4], (name, tensor[:-1]), *weights[5:]], name
