"""A cluster of nodes of one CPU, in a process of its own. It prints its address; at the first line that it reads the
second of its two nodes dies and another joins, or, started with `grow`, a second one joins the first; at the next it
ends."""

import sys

from ray.cluster_utils import Cluster

SIZE = {"num_cpus": 1, "object_store_memory": 80_000_000}


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={**SIZE, "include_dashboard": False})
    second = None if sys.argv[1:] == ["grow"] else cluster.add_node(**SIZE)
    print(cluster.address, flush=True)
    sys.stdin.readline()
    if second is not None:
        cluster.remove_node(second, allow_graceful=False)
    cluster.add_node(**SIZE)
    print("joined", flush=True)
    sys.stdin.readline()
    cluster.shutdown()


if __name__ == "__main__":
    main()
