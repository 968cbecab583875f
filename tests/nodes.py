"""A Ray of a head and two worker nodes on this machine, in a process of its own: python nodes.py TEMP PORT CPUS ...

The tests' own process may have joined another Ray, with other ideas of authentication. Prints a line when the nodes are
up, and takes them down when its standard input closes.
"""

import sys
import tempfile
from pathlib import Path

from ray.cluster_utils import Cluster

if __name__ == "__main__":
    temp, port, head_cpus, *cpus = sys.argv[1:]
    # Where Ray notes the address of a head, whatever the head's own folder: it fails if no Ray has made it yet.
    Path(tempfile.gettempdir(), "ray").mkdir(exist_ok=True)
    head = {
        "num_cpus": int(head_cpus),
        "include_dashboard": True,
        "dashboard_port": int(port),
        "dashboard_agent_listen_port": 0,  # Ray's own number for it may be another Ray's on this machine
        "temp_dir": temp,
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for number, amount in enumerate(cpus):  # each with folders of its own, as on machines of their own
        cluster.add_node(num_cpus=int(amount), temp_dir=f"{temp}/{number}", include_log_monitor=True, wait=False)
    cluster.wait_for_nodes()
    # What ``ray start`` writes: else the jobs join any Ray that is found on this machine.
    for folder in (temp, *(f"{temp}/{number}" for number in range(len(cpus)))):
        (Path(folder) / "ray_current_cluster").write_text(cluster.address, encoding="utf-8")
    print(cluster.webui_url, cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()
