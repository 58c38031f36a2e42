"""What the state of a training run is, and how it is kept. Knows nothing of Ray."""
