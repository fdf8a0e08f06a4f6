"""`python -m testcluster up|down`: a cluster for people, who have kubectl."""

from __future__ import annotations

import argparse
import sys

from testcluster.cluster import Cluster
from testcluster.errors import ClusterError
from testcluster.ground import Ground


def main() -> int:
    """0 when done; 1 with a sentence on standard error when not."""
    parser = argparse.ArgumentParser(prog="testcluster", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    up = verbs.add_parser("up", help="bring up a cluster that stays")
    up.add_argument("--nodes", type=int, default=3)
    up.add_argument("--gpus", type=int, default=2, help="pretended GPUs a node")
    verbs.add_parser("down", help="remove it, and whatever killed tests left")
    arguments = parser.parse_args()
    try:
        if arguments.verb == "up":
            _up(arguments.nodes, arguments.gpus)
        else:
            print(f"{Ground.remove_kept()} removed")
    except ClusterError as error:
        print(f"testcluster: {error}", file=sys.stderr)
        return 1
    return 0


def _up(nodes: int, gpus: int) -> None:
    ground = Ground.open()
    try:
        cluster = Cluster(ground, nodes, gpus)
        cluster.start()
        ground.keep()
    except BaseException:
        ground.close()
        raise
    print(cluster.control_plane.kubectl("get", "nodes"))
    print(f"export KUBECONFIG={cluster.control_plane.kubeconfig}")
    print(f"export PATH={cluster.programs}:$PATH")
    print("Remove it with: make cluster-down")


if __name__ == "__main__":
    sys.exit(main())
