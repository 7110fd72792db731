"""Stub."""
from __future__ import annotations
import torch
include = torch._C._dispatch_tls_set_dispatch_key_included
KEY = torch._C._parse_dispatch_key("TESTING_ONLY_GenericMode")
_library = torch.library.Library("_", "IMPL")
_library.fallback(torch.library.fallthrough_kernel, "TESTING_ONLY_GenericMode")
