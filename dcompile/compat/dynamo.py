"""What Dynamo knows of the graphs it hands to a backend. Seen in torch 2.11 to 2.15."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Node


def lookup_backend(name: str) -> Callable[..., Any]:
    """The compiler registered under a name of ``torch.compiler.list_backends()``."""
    from torch._dynamo.backends.registry import lookup_backend as lookup

    compiler: Callable[..., Any] = lookup(name)
    return compiler


def compiler_error(error: BaseException) -> BaseException:
    """What a compiler raised, without Dynamo's exception around it."""
    inner = getattr(error, "inner_exception", None)
    return inner if isinstance(inner, BaseException) else error


def is_of_module(node: Node) -> bool:
    """Whether Dynamo found an input on the module rather than among the call's arguments."""
    source = _source_of(node)
    while getattr(source, "base", None) is not None:
        source = source.base
    return getattr(source, "local_name", None) == "self"


def argument_name(node: Node) -> str:
    """The parameter of forward that an input is; behind a decorator its keyword, or ``args[0]``."""
    source = _source_of(node)
    local, index = getattr(source, "local_name", None), getattr(source, "index", None)
    if local is None and index is not None:
        outer = getattr(source.base, "local_name", None)
        if outer == "kwargs":
            return str(index)
        if outer == "args":
            return f"args[{index}]"
    return str(local or node.target)


def example_value(node: Node) -> Any:
    """What Dynamo computed as an example of a node's value."""
    return node.meta.get("example_value")


def _source_of(node: Node) -> Any:
    return getattr(node.meta.get("grapharg"), "source", None)
