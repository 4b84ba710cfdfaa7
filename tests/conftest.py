import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # tests import `reference`, and the two scripts
torch.set_num_threads(1)  # small tensors: a second thread waits more than it works
