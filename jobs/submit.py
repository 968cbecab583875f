"""Send a run to a cluster and follow it to its result: python jobs/submit.py configs/quickstart.yaml [KEY=VALUE ...]

The cluster is that of RAY_API_SERVER_ADDRESS, by default the one whose dashboard is at http://127.0.0.1:8265.
"""

import sys

import raytorch

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    client = raytorch.Client()
    job = client.submit(raytorch.load(sys.argv[1], set=sys.argv[2:]))
    print(job.link)
    for text in client.follow(job.id):
        print(text, end="")
    job = client.wait(job.id)
    if job.failure:
        sys.exit(f"{job.id} {job.state}: {job.failure.cause}: {job.failure.message}")
    print(client.result(job.id)["metrics"])
