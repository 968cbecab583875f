"""Train a run's configuration from a script: python jobs/train.py configs/quickstart.yaml [KEY=VALUE ...]"""

import sys

import raytorch

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    result = raytorch.train(sys.argv[1], set=sys.argv[2:])
    print(result.state, result.metrics, result.path)
