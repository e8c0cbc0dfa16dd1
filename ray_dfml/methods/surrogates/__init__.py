"""Surrogates of services, which methods invert in their place: `config` holds the settings, `stage` the rounds."""
