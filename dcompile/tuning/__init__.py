"""Finds schedules by measurement: ``tune``, ``calibrate``, ``profile``."""
