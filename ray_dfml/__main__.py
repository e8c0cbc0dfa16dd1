"""`python -m ray_dfml`."""

from ray_dfml.cli import main

main()
