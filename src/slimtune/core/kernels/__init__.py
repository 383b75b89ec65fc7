"""Tensor code: fused linear layers, losses, optimizers, activation memory."""
