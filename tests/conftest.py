import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))  # tests import `reference`
torch.set_num_threads(1)  # small tensors: a second thread waits more than it works
