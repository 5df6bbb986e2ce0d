"""Settings of the whole test run."""

import os

import torch

# Servers of the tests are on this machine, whatever proxy leads to others.
for _name in ("NO_PROXY", "no_proxy"):
    os.environ[_name] = ",".join(filter(None, (os.environ.get(_name), "127.0.0.1,localhost")))

# The models are tiny: a second thread costs more than it brings, and disturbs what runs beside the tests.
torch.set_num_threads(1)
