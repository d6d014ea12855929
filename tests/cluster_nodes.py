"""A cluster of two nodes of one CPU, in a process of its own. It prints its address; at the first line that it reads
the second node dies and another joins; at the next it ends."""

import sys

from ray.cluster_utils import Cluster

SIZE = {"num_cpus": 1, "object_store_memory": 80_000_000}


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={**SIZE, "include_dashboard": False})
    second = cluster.add_node(**SIZE)
    print(cluster.address, flush=True)
    sys.stdin.readline()
    cluster.remove_node(second, allow_graceful=False)
    cluster.add_node(**SIZE)
    sys.stdin.readline()
    cluster.shutdown()


if __name__ == "__main__":
    main()
