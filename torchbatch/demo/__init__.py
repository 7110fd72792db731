"""The demo: train a small CNN with per-example clipped gradients and find the images that it finds hardest.

``python -m torchbatch demo`` runs it. The modules, in the order in which they are used: ``data`` (the images),
``model`` (the network and its loss for one image), ``training`` (per-example gradients, clipped), ``comparison``
(the same gradients from a loop), ``report`` (what is printed) and ``figure`` (what is drawn).
"""

from __future__ import annotations

from torchbatch.demo.main import DemoError, Options, run

__all__ = ["DemoError", "Options", "run"]
