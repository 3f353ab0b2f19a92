"""The skeleton graph as adjacency matrices."""

import numpy as np
from numpy.typing import NDArray

from ffn.layouts import Layout


def spatial_adjacency(layout: Layout) -> NDArray[np.float32]:
    """(3, V, V) adjacency of the spatial partition: the joint itself, neighbours closer to the centre, neighbours further.

    Entry [k, v, w] is the share of joint v in joint w; columns of the whole graph sum to one. A neighbour as far from the
    centre as the joint itself counts as closer, and every joint more than one bone away from the centre is equally far.
    Source: ST-GCN, section 3.3 (spatial configuration); MMAction2's `stgcn_spatial` with `max_hop=1`.
    """
    count = len(layout.joints)
    hops = np.full((count, count), np.inf)
    np.fill_diagonal(hops, 0)
    for v, p in layout.edges:
        hops[v, p] = hops[p, v] = 1
    linked = np.isfinite(hops)
    shares = linked / linked.sum(0, keepdims=True)
    from_center = hops[:, layout.center]
    closer = from_center[:, None] >= from_center[None, :]
    neighbour = hops == 1
    return np.stack([shares * np.eye(count), shares * (neighbour & closer), shares * (neighbour & ~closer)]).astype(np.float32)
