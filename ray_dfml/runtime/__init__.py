"""What carries out a run: backends, the driver, the run folder, checkpoints. Only `cluster` and `dispatch` use Ray."""
