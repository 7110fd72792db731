"""stub"""
import torch
class LocalTensor(torch.Tensor): pass
def settle(x: torch.Tensor) -> None:
    x.__class__ = torch.Tensor
