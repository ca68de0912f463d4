"""Installs wrappers on networks, or configures those that are installed."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from dcompile.compat.hooks import forward_slot, without_torch_compile
from dcompile.runtime.dispatcher import Dispatcher
from dcompile.runtime.lazy_network import LazyNetwork
from dcompile.runtime.settings import Settings
from dcompile.runtime.wrapper import own_forward_of_copy, wrapper_of


def install(network: nn.Module, settings: Settings) -> Dispatcher:
    """Make ``network`` run with these settings from its next call on."""
    found = wrapper_of(network)
    if isinstance(found, Dispatcher):
        found.configure(settings)
        return found
    if found is not None:
        found.uninstall()
    own_forward_of_copy(network)
    slot = forward_slot(network)
    dispatcher = Dispatcher(network, getattr(network, slot), settings)
    dispatcher.install(slot)
    return dispatcher


def install_companions(networks: Iterable[nn.Module], dispatcher: Dispatcher) -> None:
    """Have these networks compute only those results that the denoiser reads."""
    settings = dispatcher.settings
    wanted = (
        settings.backend,
        settings.verbose,
        settings.program_memory,
        settings.channels_last,
    )
    for network in networks:
        found = wrapper_of(network)
        if isinstance(found, LazyNetwork):
            found.configure(*wanted)
        elif found is None and without_torch_compile(network) is network:
            slot = forward_slot(network)
            found = LazyNetwork(network, getattr(network, slot), *wanted)
            found.install(slot)
        if isinstance(found, LazyNetwork):
            found.users.add(dispatcher)
            if found not in dispatcher.companions:
                dispatcher.companions.append(found)


def detach(dispatcher: Dispatcher, companions: Iterable[LazyNetwork]) -> None:
    """Have the denoiser read no more of these networks' results."""
    gone = list(companions)
    dispatcher.companions = [one for one in dispatcher.companions if one not in gone]
    for companion in gone:
        companion.users.discard(dispatcher)
        companion.follow_users()
