"""Decides what each step runs: schedules, plans, forecasts, error gains of samplers."""
