"""The loop of common.py as hand-written DDP: torchrun --nproc_per_node 2 torchrun_ddp.py DATA"""

import json
import os
import sys
import time

STARTED = float(os.environ.get("T_START", time.time()))

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from common import Net, loader, train

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
result = train(DistributedDataParallel(Net()), loader(sys.argv[1], rank, world), STARTED)
if rank == 0:
    print(json.dumps({"peer": "torchrun", "workers": world, **result}), flush=True)
dist.destroy_process_group()
