"""`shared-answers`: `config` holds its settings, `images` what is asked about, and `fit` what is learned of it."""

from ray_dfml.methods.shared_answers.method import METHOD as METHOD
