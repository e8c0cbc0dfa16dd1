"""The pool doctor: what can be told of the teachers of a pool, and of what they did to a learner, without data."""
