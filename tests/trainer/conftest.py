"""One thread: these models are smaller than the cost of waking a second one, and threads change last bits."""

import torch

torch.set_num_threads(1)
