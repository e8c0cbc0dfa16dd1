"""Older methods that distil a teacher, adapted to teachers that only name a class; IDEAL's tables compare with them.

They were made for teachers whose gradients, features or probabilities are at hand. The adaptation is the same for all:
**what the teacher says is a constant one-hot vector. A term that needs the teacher's gradient is computed on the
student, and so is one that needs its features or its batch-norm statistics; a term that then says nothing is dropped.**
`adversarial` has the methods that ask about fresh images in every step of the student, `inversion` those that make a
batch of images, ask about it once, and keep it. Loop, budget and student are those of `methods.students`.
"""

from ray_dfml.methods.distillers.adversarial import DAFL as DAFL
from ray_dfml.methods.distillers.adversarial import DAST as DAST
from ray_dfml.methods.distillers.adversarial import DFME as DFME
from ray_dfml.methods.distillers.adversarial import ZSKT as ZSKT
from ray_dfml.methods.distillers.inversion import CMI as CMI
from ray_dfml.methods.distillers.inversion import DEEPINVERSION as DEEPINVERSION
