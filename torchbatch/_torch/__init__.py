"""Floor 1: the only place that touches private names of PyTorch.

Every file states which names it uses and the PyTorch versions they were seen on.
"""
