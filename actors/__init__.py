"""Processes and bytes between them, on Ray. Carries out what `resilient.core` decides; decides nothing."""
