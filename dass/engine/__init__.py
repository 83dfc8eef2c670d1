"""Whole networks: capture, simplify, plan, run. `dass.compile` is the way in."""
