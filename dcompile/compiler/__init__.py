"""A module and a call become a program: signature, capture, cut, compile, cache."""
