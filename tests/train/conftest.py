"""One thread: tiny products gain nothing from two, and results are bit-identical for one number of threads."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
