"""The time of a collective, as NCCL's own tuner estimates it: latency of the steps plus bytes over bandwidth.

The constants are those of NCCL's tuner for Hopper (src/graph/tuning.cc, topo.h), the algorithms rings and double binary
trees with the protocols LL, LL128 and Simple; the fastest is taken, as NCCL does. In-network reduction (SHARP, NVLS),
which NCCL uses where the hardware has it, is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

GPUS_PER_NODE = 8
NVLINK = 18 * 20.6e9  # bytes/s and direction that NCCL counts; by the data sheet 450e9
LL, LL128, SIMPLE = range(3)
_BASE = {"ring": (6.6e-6, 14.0e-6, 8.4e-6), "tree": (6.8e-6, 14.0e-6, 8.4e-6)}  # s, per protocol
_NVLINK_STEP = {"ring": (0.6e-6, 1.9e-6, 3.4e-6), "tree": (0.6e-6, 1.25e-6, 4.0e-6)}
_NETWORK_STEP = {"ring": (2.7e-6, 4.0e-6, 14.0e-6), "tree": (5.0e-6, 8.5e-6, 14.0e-6)}
_POST = (1e-6, 1e-6, 3e-6)  # the least time of a step between GPUs of a node, if there are several nodes
_LL_MOST = (141e9, 45e9, 35e9)  # bytes/s of LL on one, two and more nodes


@dataclass(frozen=True)
class Network:
    """What connects the nodes of eight GPUs, which are on NVLink inside.

    node: bytes/s and direction of all network ports of a node;  ports: of a node
    nvlink: whether the network is NVLink, too
    """

    name: str
    node: float
    ports: int
    nvlink: bool = False

    def nodes(self, ranks: int) -> int:
        return math.ceil(ranks / GPUS_PER_NODE)

    def bandwidth(self, ranks: int) -> float:
        """Return the bytes/s of a ring or tree through all nodes, which uses all network ports of a node."""
        return NVLINK if self.nodes(ranks) == 1 else min(NVLINK, self.node)

    def between_nodes(self, algorithm: str, protocol: int) -> float:
        """Return the latency of a step between nodes."""
        return (_NVLINK_STEP if self.nvlink else _NETWORK_STEP)[algorithm][protocol]

    def inside_nodes(self, algorithm: str, protocol: int, ranks: int) -> float:
        """Return the latency of a step inside a node; a network's ports are served at the same time."""
        posts = not self.nvlink and self.nodes(ranks) > 1 and algorithm == "ring"
        return max(_NVLINK_STEP[algorithm][protocol], _POST[protocol] if posts else 0.0)

    def ll_bandwidth(self, ranks: int) -> float:
        """Return the most bytes/s of the protocol LL."""
        return _LL_MOST[0 if self.nvlink else min(self.nodes(ranks), 3) - 1]

    def hop(self, ranks: int) -> tuple[float, float]:
        """Return the bytes/s and the latency of the slowest link from a GPU to the next."""
        if self.nodes(ranks) == 1:
            return NVLINK, _NVLINK_STEP["ring"][SIMPLE]
        return self.node / self.ports, self.between_nodes("ring", SIMPLE)


NETWORKS = (
    # As if NVLink connected all GPUs: a bound.
    Network("NVLink", GPUS_PER_NODE * NVLINK, GPUS_PER_NODE, nvlink=True),
    Network("InfiniBand", GPUS_PER_NODE * 50e9, GPUS_PER_NODE),  # 400 Gb/s for each GPU
    Network("Ethernet", 12.5e9, 1),  # 100 Gb/s for each node
)


def seconds(op: str, size: float, ranks: int, network: Network) -> float:
    """Return the time of a collective: "all_reduce", "all_gather" or "reduce_scatter".

    Args:
        size: bytes that each rank contributes; for a reduce-scatter its whole input.
    """
    if ranks == 1:
        return 0.0
    options = [_ring(op, size, ranks, network, protocol) for protocol in (LL, LL128, SIMPLE)]
    if op == "all_reduce":
        options += [_tree(size, ranks, network, protocol) for protocol in (LL, LL128, SIMPLE)]
    return min(options)


def _ring(op: str, size: float, ranks: int, network: Network, protocol: int) -> float:
    rounds = 2 if op == "all_reduce" else 1
    nodes = network.nodes(ranks)
    steps, between_nodes = rounds * (ranks - 1), rounds * (nodes - 1)
    latency = _BASE["ring"][protocol] + (steps - between_nodes) * network.inside_nodes("ring", protocol, ranks)
    latency += between_nodes * network.between_nodes("ring", protocol)
    bandwidth = network.bandwidth(ranks)
    bandwidth *= (0.5, 120 / 128, 1.0)[protocol]  # the rest are flags
    if protocol == LL:
        bandwidth = min(bandwidth, network.ll_bandwidth(ranks))
    whole = size * (ranks if op == "all_gather" else 1)
    return latency + rounds * whole * (ranks - 1) / ranks / bandwidth


def _tree(size: float, ranks: int, network: Network, protocol: int) -> float:
    nodes = network.nodes(ranks)
    inside = math.ceil(ranks / nodes) - 1
    latency = _BASE["tree"][protocol] + 2 * inside * network.inside_nodes("tree", protocol, ranks)
    latency += 2 * math.log2(nodes) * network.between_nodes("tree", protocol)
    bandwidth = network.bandwidth(ranks)
    bandwidth *= (1 / 3.8, 7 / 9 if nodes == 1 else 120 / 128, 0.92)[protocol]
    if protocol == LL:
        bandwidth = min(bandwidth, network.ll_bandwidth(ranks))
    return latency + 2 * size / bandwidth
