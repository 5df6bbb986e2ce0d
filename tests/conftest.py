"""Settings of the whole test run."""

import torch

# The models are tiny: a second thread costs more than it brings, and disturbs what runs beside the tests.
torch.set_num_threads(1)
