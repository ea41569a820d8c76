"""What tests of arithmetic run on: the CPU, and a GPU where torch finds one."""

import torch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
