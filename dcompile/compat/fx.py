"""What torch.fx knows about a graph's code and does not offer by a public function."""

from __future__ import annotations

from torch.fx import GraphModule


def source_of(graph_module: GraphModule) -> str:
    """The Python source of a graph's ``forward``, with the imports that it needs.

    FX pickles this source. To unpickle it, FX traces it, and what depends on no input is computed
    at that time and becomes a constant; who runs the source itself computes it at each call.
    """
    _, (body, imports) = graph_module.__reduce__()
    return f"{imports}\n{body['_code']}"
