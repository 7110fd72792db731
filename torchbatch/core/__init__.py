"""Floor 2: pure machinery that sees flat lists of tensors and integers."""
