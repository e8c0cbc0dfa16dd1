"""`shared-answers`: `config` holds its settings and images, `method` its functions, and `fit` what is learned."""

from ray_dfml.methods.shared_answers.method import METHOD as METHOD
