"""Decisions, and nothing else: no clock, no randomness, no threads, no I/O, no Ray, no torch.

Facts and time come in as arguments; what is to be done goes out as instructions.
"""
