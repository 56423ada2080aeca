"""Costs of a training step: operations of a forward and backward pass, memory, and the speed of cards."""
