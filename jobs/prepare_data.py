"""Prepare a data set on every node of a Ray cluster: python jobs/prepare_data.py mnist /data [--address auto]"""

import argparse

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytorch.cluster import joined_ray
from raytorch.config import Cifar10Data, MnistData
from raytorch.datasets import count, prepare

CONFIGS = {"mnist": MnistData, "cifar10": Cifar10Data}


@ray.remote(num_cpus=0, max_retries=2)
def prepare_here(name: str, root: str) -> str:
    """Where nodes share the folder, one of them downloads and the others wait for it."""
    config = CONFIGS[name](root=root)
    prepare(config)
    return " + ".join(f"{number:,}" for number in count(config).values()) + " images"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=CONFIGS)
    parser.add_argument("root", help="folder on every node")
    parser.add_argument("--address", help="the running cluster; by default a Ray is started here")
    options = parser.parse_args()
    with joined_ray(options.address):
        tasks = {}
        for node in ray.nodes():
            if node["Alive"]:
                there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                task = prepare_here.options(scheduling_strategy=there).remote(options.name, options.root)
                tasks[task] = node["NodeManagerAddress"]
        failed = 0
        for task, node in tasks.items():
            try:
                print(f"{node}  {options.root}  {ray.get(task)}")
            except ray.exceptions.RayError as error:
                failed += 1
                print(f"{node}  {getattr(error, 'cause', None) or error}")
    if failed:
        raise SystemExit(f"{failed} of {len(tasks)} nodes failed")


if __name__ == "__main__":
    main()
