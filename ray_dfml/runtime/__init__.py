"""Where runs happen: backends, the driver, the run folder, checkpoints. Only `cluster` knows Ray."""
