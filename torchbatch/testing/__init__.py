"""What tests are made of: the loop that every batched result is held against."""

from torchbatch.testing.loop import loop

__all__ = ["loop"]
