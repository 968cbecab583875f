"""The loop of common.py as a plain Ray Train script: python bare_ray_train.py DATA"""

import json
import os
import sys
import tempfile
import time

STARTED = float(os.environ.get("T_START", time.time()))
HERE = os.path.dirname(os.path.abspath(__file__))


def loop(config):
    import ray.train
    import torch
    from ray.train.torch import prepare_model

    sys.path.insert(0, config["here"])
    from common import Net, loader, train

    torch.set_num_threads(1)
    torch.manual_seed(0)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    result = train(prepare_model(Net()), loader(config["data"], rank, world), config["started"])
    if rank == 0:
        with open(config["out"], "w") as out:
            json.dump({"peer": "ray train", "workers": world, **result}, out)


if __name__ == "__main__":
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "result.json")
        TorchTrainer(
            loop,
            train_loop_config={"started": STARTED, "data": os.path.abspath(sys.argv[1]), "here": HERE, "out": out},
            scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(storage_path=folder),
        ).fit()
        print(open(out).read())
