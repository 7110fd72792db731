"""Floor 3: what a user applies to a function, one file each."""
