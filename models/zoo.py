import torch
from timm.data import IMAGENET_DEFAULT_MEAN as M, IMAGENET_DEFAULT_STD as S
def normalization():
    return torch.tensor(M).view(3,1,1), torch.tensor(S).view(3,1,1)
