"""Runs one step: dispatcher, run tracking, lanes, planning, counters, CUDA graphs."""
