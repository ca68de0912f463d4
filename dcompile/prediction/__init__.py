"""Predicts the error of schedules from recordings of uncached runs, and finds the best one."""
